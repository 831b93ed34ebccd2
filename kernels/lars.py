"""LARS, layer-wise adaptive rates for large batches, as SimCLR's code has it.

You, Gitman, Ginsburg. Large Batch Training of Convolutional Networks. 2017, arXiv 1708.03888, Algorithm 1.

    g <- grad + wd w      trust = eta |w| / |g|      v <- m v + lr trust g      w <- w - v

The rate stands inside the momentum: a change of lr reaches v only gradually. MoCo v3 has it outside
(w <- w - lr v): the two agree only while lr is constant.
"""
import torch


class LARS(torch.optim.Optimizer):
    """Tensors of one dimension (biases, norms) get neither weight decay nor trust ratio."""

    def __init__(self, params, lr, momentum=.9, weight_decay=0., eta=1e-3):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for w in (p for p in group["params"] if p.grad is not None):
                g, trust = w.grad, 1.
                if w.ndim > 1:
                    g = g + group["weight_decay"] * w
                    size, slope = w.norm(), g.norm()
                    trust = torch.where((size > 0) & (slope > 0), group["eta"] * size / slope, 1.)
                if "momentum" not in self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
                v = self.state[w]["momentum"]
                w -= v.mul_(group["momentum"]).add_(group["lr"] * trust * g)
        return loss
