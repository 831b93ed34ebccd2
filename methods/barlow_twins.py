"""Barlow Twins (2021): two views, equal features, no feature twice.

The cross-correlation of two views' features shall be the identity: on its diagonal a feature is the same in
both views, off it no two features say the same.

Zbontar, Jing, Misra, LeCun, Deny. Barlow Twins: Self-Supervised Learning via Redundancy Reduction.
ICML 2021, arXiv 2103.03230.

    x [B,3,H,W] --view--> v1 --+                                                       +-- z1 [B,P] --+
                --view--> v2 --+--> encoder (kept) --> h [B,D] each --> projector --> -+-- z2 [B,P] --+
                          loss: |C - I|^2, lam off the diagonal <-- C [P,P], standardised over the batch

Good at: image-level features without negatives, teacher, predictor or stop-gradient. Not at: tiny batches,
whose correlations are noise.

Run      python methods/barlow_twins.py
         linear 40.1 ± 1.6 % (untrained 27.2; each seed at least +11), k-NN 30.4 ± 1.4 (21.9); 58 s on 2 cores
Differs  one rate for weights, biases and norms; LARS has the rate inside the momentum, as SimCLR's code;
         blocks do not start as the identity; crops are resized bilinearly; the rate ends at 0; the quick run
         has AdamW, narrower layers, lam .01, larger crops, and neither blur nor solarise.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.cross_correlation import barlow_twins_loss
from kernels.views import views


@dataclass
class Config(common.Config):
    steps: int = 700               # optimisation steps
    hidden: int = 512              # width of the projector's hidden layers
    dim: int = 512                 # width of z
    lam: float = .01               # weight lambda of what is off the diagonal
    crop: float = .2               # smallest share of the image's area in a view
    blur: float = 0.               # probability of blur in view 2; if positive, view 1 is always blurred
    solarise: float = 0.           # probability of solarising view 2


# Official code: rate .2 x B/256 of the weights, warm-up 10 epochs; there the rate ends at a thousandth.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=1000, batch_size=2048,
             optimizer="lars", lr=1.6, weight_decay=1e-6, warmup=.01, hidden=8192, dim=8192, lam=.0051,
             crop=.08, blur=.1, solarise=.2)


def mlp(width, hidden, dim):
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, dim, bias=False))


class BarlowTwins(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. gather: [B,P] -> the rows of all processes."""

    def __init__(self, encoder, hidden=512, dim=512, lam=.01, gather=lambda z: z):
        super().__init__()
        self.encoder, self.lam, self.gather = encoder, lam, gather
        self.projector = mlp(encoder.dim, hidden, dim)

    def forward(self, v1, v2):                                   # [B,3,H,W] each -> loss
        self.h, h2 = self.encoder(v1), self.encoder(v2)          # [B,D] each
        self.z, z2 = self.projector(self.h), self.projector(h2)  # [B,P] each
        # = sum_i (1 - C_ii)^2 + lam sum_{i != j} C_ij^2, C = z1.T @ z2 / B of standardised z     Eq. 1 and 2
        return barlow_twins_loss(self.gather(self.z), self.gather(z2), self.lam)


def build(cfg):
    return BarlowTwins(make_encoder(cfg), cfg.hidden, cfg.dim, cfg.lam, common.gather)


@torch.no_grad()
def correlation(method, v1, v2, n=64):                           # [B,3,H,W] each -> |C| as an image [1,3,n,n]
    """Black where two features, one of each view, have nothing in common, white where they are the same."""
    z1, z2 = (method.eval().projector(method.encoder(v)).T[:n] for v in (v1, v2))        # [n,B] each
    method.train()
    return torch.corrcoef(torch.cat([z1, z2]))[:len(z1), len(z1):].abs().expand(1, 3, -1, -1)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    one = dict(scale=(cfg.crop, 1.), jitter=(.4, .4, .2, .1), grey=.2, blur=float(cfg.blur > 0))
    two = one | dict(blur=cfg.blur, solarise=cfg.solarise)
    pair = views(data.test_images[:500], **one), views(data.test_images[:500], **two)
    before = correlation(method, *pair)
    independent = cfg.dim * (1 + cfg.lam * cfg.dim / cfg.batch_size)     # C_ij of noise: variance 1/B
    model = run.start(method, data, {"independent": independent}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v1, v2 = views(x, **one), views(x, **two)
        with run.autocast():
            loss = model(v1, v2)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, z=method.z)

    rows = {"before": before, "after": correlation(method, *pair)}
    common.save_grid(run.folder / "correlation.png", rows, "|C| of 64 features")
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
