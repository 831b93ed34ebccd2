"""VICReg (2022): pull views together, spread features, decorrelate them.

Three terms for what a good embedding is: views of an image agree, every feature varies over the batch, and no
two features vary together.

Bardes, Ponce, LeCun. VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning.
ICLR 2022, arXiv 2105.04906.

    x [B,3,H,W] --view--> v1 --+                                                       +-- z1 [B,P] --+
                --view--> v2 --+--> encoder (kept) --> h [B,D] each --> projector --> -+-- z2 [B,P] --+
               loss: 25 |z1 - z2|^2 + 25 (1 - std of each feature)+ + covariances^2 off the diagonal  <-'

Good at: image-level features without negatives, teacher, predictor or stop-gradient; two of its terms look
at one view alone, so views may be of different kinds. Not at: doing without a balance of its weights.

Run      python methods/vicreg.py
         linear 43.4 ± 1.0 % (untrained 27.2; each seed at least +15), k-NN 32.1 ± 0.9 (21.9); 57 s on 2 cores
Differs  LARS has the rate inside the momentum, as SimCLR's code; blocks do not start as the identity; crops
         are resized bilinearly; the rate ends at 0; the quick run has AdamW, narrower layers, larger crops,
         and neither blur nor solarise.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.cross_correlation import vicreg_covariance
from kernels.views import views


@dataclass
class Config(common.Config):
    steps: int = 700               # optimisation steps
    hidden: int = 512              # width of the projector's hidden layers
    dim: int = 512                 # width of z
    invariance: float = 25.        # weight lambda of the distance of two views
    variance: float = 25.          # weight mu of the features' deviations
    covariance: float = 1.         # weight nu of their covariances
    crop: float = .2               # smallest share of the image's area in a view
    blur: float = 0.               # probability of blur in view 2; if positive, view 1 is always blurred
    solarise: float = 0.           # probability of solarising view 2


# Official code: rate .2 x B/256, warm-up 10 epochs; there the rate ends at a thousandth.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=1000, batch_size=2048,
             optimizer="lars", lr=1.6, weight_decay=1e-6, warmup=.01, hidden=8192, dim=8192, crop=.08,
             blur=.1, solarise=.2)


def spread_term(z):                                              # [B,P] -> [], 0 where every deviation is 1
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()           # Eq. 1 and 2


def mlp(width, hidden, dim):
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, dim, bias=False))


class VICReg(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. gather: [B,P] -> the rows of all processes."""

    def __init__(self, encoder, hidden=512, dim=512, weights=(25., 25., 1.), gather=lambda z: z):
        super().__init__()
        self.encoder, self.weights, self.gather = encoder, weights, gather
        self.projector = mlp(encoder.dim, hidden, dim)

    def forward(self, v1, v2):                                   # [B,3,H,W] each -> loss
        self.h, h2 = self.encoder(v1), self.encoder(v2)          # [B,D] each
        self.z, z2 = self.projector(self.h), self.projector(h2)  # [B,P] each
        z1, z2 = (self.gather(z.to(torch.promote_types(z.dtype, torch.float32))) for z in (self.z, z2))
        s = F.mse_loss(z1, z2)                                   # Eq. 5, but a mean over features too
        v = (spread_term(z1) + spread_term(z2)) / 2              # official code; the text has the sum
        c = vicreg_covariance(z1) + vicreg_covariance(z2)        # Eq. 3 and 4
        self.parts = dict(s=s.detach(), v=v.detach(), c=c.detach())
        return sum(w * term for w, term in zip(self.weights, (s, v, c), strict=True))    # Eq. 6


def build(cfg):
    weights = cfg.invariance, cfg.variance, cfg.covariance
    return VICReg(make_encoder(cfg), cfg.hidden, cfg.dim, weights, common.gather)


@torch.no_grad()
def covariance(method, v, n=64):                                 # [B,3,H,W] -> |Cov| as an image [1,3,n,n]
    """Black where two features do not vary together; on the diagonal, their variances."""
    z = method.eval().projector(method.encoder(v))               # [B,P]
    method.train()
    return z.T.cov()[:n, :n].abs().expand(1, 3, -1, -1)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    one = dict(scale=(cfg.crop, 1.), jitter=(.4, .4, .2, .1), grey=.2, blur=float(cfg.blur > 0))
    two = one | dict(blur=cfg.blur, solarise=cfg.solarise)
    v = views(data.test_images[:500], **one)
    before = covariance(method, v)
    model = run.start(method, data, {"constant": .99 * cfg.variance}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v1, v2 = views(x, **one), views(x, **two)
        with run.autocast():
            loss = model(v1, v2)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, z=method.z, **method.parts)

    after = covariance(method, v)
    rows = {"before": before / after.max(), "after": after / after.max()}
    common.save_grid(run.folder / "covariance.png", rows, "|covariance| of 64 features; white: the largest")
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
