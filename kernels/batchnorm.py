"""BatchNorm over the rows of all processes on the CPU, where torch.nn.SyncBatchNorm refuses to run."""
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """In place of BatchNorm1d or 2d, of which it takes the weights: module.__class__ = SyncBatchNorm. It has
    running statistics and a momentum. Every process has the same number of rows; the process group must be
    there. Statistics are at least in fp32."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):                                        # [B,C] or [B,C,h,w], the same B everywhere
        if not self.training:
            return super().forward(x)
        dims, per_channel = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        world, dtype = dist.get_world_size(), x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        mean = all_reduce(x.mean(dims)) / world                  # [C]
        x = x - mean.view(per_channel)
        var = all_reduce(x.square().mean(dims)) / world          # [C], biased
        n = x.numel() / x.shape[1] * world
        self.num_batches_tracked += 1
        for running, now in (self.running_mean, mean), (self.running_var, var * n / max(n - 1, 1)):
            running.lerp_(now.detach().to(running.dtype), self.momentum)
        x = x * (var + self.eps).rsqrt().view(per_channel)
        if self.affine:
            x = x * self.weight.view(per_channel) + self.bias.view(per_channel)
        return x.to(dtype)
