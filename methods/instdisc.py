"""InstDisc (2018): every image is a class of its own.

Tell every image from all others by its feature; what a class's weight would be is the feature that the image
had when it was last seen, kept in a memory bank.

Wu, Xiong, Yu, Lin. Unsupervised Feature Learning via Non-Parametric Instance Discrimination.
CVPR 2018, arXiv 1805.01978.

    x [B,3,H,W] --view--> encoder (kept) --> h [B,D] --linear, |.|=1--> z [B,P] --> find memory row i among
                                                                         |           all n, or K noise rows
           memory [n,P] // <--row i = |.|=1 of t row i + (1 - t) z_i-----'

Good at: showing that no label is needed to learn what images have in common. Not at: short runs, as each
image meets its own feature once an epoch, and the first epoch finds a random bank.

Run      python methods/instdisc.py
         linear 35.8 ± 0.6 % (untrained 26.3; each seed at least +7), k-NN 26.3 ± 0.7 (20.2); 59 s on 2 cores
Differs  momentum is Nesterov's, biases and norms do not decay; the rate falls by a cosine; milder jitter, of
         four in five views; the quick run has AdamW, tau .2 and the exact softmax. --proximal, off, is the
         paper's term; the official code has none.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.info_nce import info_nce
from kernels.views import views


@dataclass
class Config(common.Config):
    data: str = "toys:n=8000"      # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    steps: int = 1200              # optimisation steps
    dim: int = 128                 # width of z
    tau: float = .2                # temperature of the similarities
    negatives: int = 0             # K noise rows an image for NCE; 0 = the exact softmax over all n rows
    keep: float = .5               # share t of the old feature in a memory row that is updated
    proximal: float = 0.           # weight lambda of the squared distance to the memory row
    crop: float = .2               # smallest share of the image's area in a view


# Official code, ImageNet; the rate drops to a tenth at epochs 120 and 160.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=200, batch_size=256,
             optimizer="sgd", lr=.03, warmup=0., tau=.07, negatives=4096)


def nce(s, z_n, n):
    """s [B,1+K]: exp(similarity / tau) of the own row and of K drawn uniformly among n. -> loss"""
    k = s.shape[1] - 1
    p = s / z_n                                                  # [B,1+K]  P(i|v)
    own = p[:, 0] / (p[:, 0] + k / n)                            # [B]      h(i,v): data, not noise
    noise = (k / n) / (p[:, 1:] + k / n)                         # [B,K]    1 - h(i',v)
    return -(own.log() + noise.log().sum(1)).mean()


class InstDisc(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. n: how many images there are. gather: [B,...] -> the rows
    of all processes. Call update_memory(index) after every optimizer step."""

    def __init__(self, encoder, n, dim=128, tau=.1, negatives=0, keep=.5, proximal=0., gather=lambda z: z):
        super().__init__()
        self.encoder, self.projector = encoder, nn.Linear(encoder.dim, dim)
        self.tau, self.negatives, self.keep = tau, negatives, keep
        self.proximal, self.gather = proximal, gather
        self.register_buffer("memory", (2 * torch.rand(n, dim) - 1) * (3 / dim) ** .5)   # [n,P]  |.| about 1
        self.register_buffer("z_n", torch.zeros(()))             # Z, once it is known

    def forward(self, v, index):                                 # [B,3,H,W], [B] -> loss
        self.h = self.encoder(v)                                 # [B,D]
        self.z = F.normalize(self.projector(self.h).to(self.memory.dtype), dim=1)    # [B,P]
        stay = (self.z - self.memory[index]).square().sum(1).mean()                      # []
        if not self.negatives:
            # = cross_entropy(z @ memory.T / tau, index)
            return info_nce(self.z, self.memory, index, self.tau) + self.proximal * stay
        n = len(self.memory)
        noise = torch.randint(n, (len(v), self.negatives), device=v.device)              # [B,K]
        rows = torch.cat([index[:, None], noise], 1)             # [B,1+K]  may hold i twice
        with torch.autocast(v.device.type, enabled=False):       # in fp32, as exp multiplies errors
            s = (torch.einsum("bp,bkp->bk", self.z, self.memory[rows]) / self.tau).exp()         # [B,1+K]
        if self.z_n == 0:                                        # from the first batch, then for good
            self.z_n.copy_(n * self.gather(s.detach()).mean())
        return nce(s, self.z_n, n) + self.proximal * stay

    @torch.no_grad()
    def update_memory(self, index):
        index, z = self.gather(index), self.gather(self.z)       # [B], [B,P] of all processes
        self.memory[index] = F.normalize(self.memory[index].lerp(z, 1 - self.keep), dim=1)


def build(cfg, n=1_281_167):
    return InstDisc(make_encoder(cfg), n, cfg.dim, cfg.tau, cfg.negatives, cfg.keep, cfg.proximal,
                    common.gather)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg, len(data.images)).to(run.device)
    optimizer = make_optimizer(cfg, method)
    k, n = cfg.negatives, len(data.images)
    chance = math.log(1 + k) + k * math.log(1 + 1 / k) if k else math.log(n)     # where P = 1/n
    model = run.start(method, data, {"ln(1+K) + 1" if k else f"ln {n}": chance}, optimizer)
    options = dict(scale=(cfg.crop, 1.), jitter=(.4, .4, .4, .1), grey=.2)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, **options)
        with run.autocast():
            loss = model(v, index)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        method.update_memory(index)
        run.log(loss, h=method.h, z=method.z)

    common.save_neighbours(run.folder / "neighbours.png", method.encoder, data)
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
