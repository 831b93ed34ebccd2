"""BYOL (2020): predict a slow copy, without any negatives.

Predict from one view what a slowly moving copy of the network says of another view; no negatives.

Grill, Strub, Altche, Tallec, Richemond et al. Bootstrap Your Own Latent. NeurIPS 2020, arXiv 2006.07733.

    x [B,3,H,W] --view--> v1 --> encoder (kept) --> h1 --> projector --> z1 --> predictor --> p1 [B,P]
                                   ~~> m                        ~~> m                            | loss, Eq. 2
                --view--> v2 --> teacher encoder --------> teacher projector --> // t2 [B,P] <---'
    and the same with v1 and v2 exchanged; both directions are summed

Good at: image-level features from small batches, for there are no negatives. Not at: showing that it works: a
constant solves the loss; predictor, stop-gradient and slow teacher keep it away (watch std and rank).

Run      python methods/byol.py
         linear 41.2 ± 0.8 % (untrained 27.2; each seed at least +13), k-NN 24.1 ± 1.6 (21.9); 81 s on 2 cores
Differs  the teacher starts as a copy, not from a seed of its own; LARS has the rate inside the momentum, as
         SimCLR's code; crops are resized bilinearly, brightness is multiplied, not added; the quick run has
         AdamW, a faster teacher, larger crops, no blur or solarise.
"""
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.views import views


@dataclass
class Config(common.Config):
    steps: int = 1300              # optimisation steps
    batch_size: int = 64           # images a step, all processes together
    lr: float = 1.5e-3             # peak learning rate: linear warm-up, then half a cosine to 0
    hidden: int = 512              # width of the hidden layer of projector and predictor
    dim: int = 128                 # width of z and p
    m: float = .95                 # momentum of the teacher at the start; rises to 1 by a cosine; 0 stays
    crop: float = .3               # smallest share of the image's area in a view
    blur: float = 0.               # probability of blur in view 2; if positive, view 1 is always blurred
    solarise: float = 0.           # probability of solarising view 2
    predictor: bool = True         # the predictor; without it the features collapse


# Official code, preset of 1000 epochs: rate .2 x B/256, warm-up 10 epochs.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=1000, batch_size=4096,
             optimizer="lars", lr=3.2, weight_decay=1.5e-6, warmup=.01, hidden=4096, dim=256, m=.996,
             crop=.08, blur=.1, solarise=.2)


def direction(p, t):                                             # [B,P], [B,P] -> []
    return (2 - 2 * F.cosine_similarity(p, t)).mean()            # = |p/|p| - t/|t||^2     Eq. 2


def mlp(width, hidden, dim):
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, dim, bias=False))


class BYOL(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. Call update_teacher(m) after every optimizer step."""

    def __init__(self, encoder, hidden=512, dim=128, predictor=True):
        super().__init__()
        self.encoder, self.projector = encoder, mlp(encoder.dim, hidden, dim)
        self.predictor = mlp(dim, hidden, dim) if predictor else nn.Identity()
        self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.projector)).requires_grad_(False)

    def forward(self, v1, v2):                                   # [B,3,H,W] each -> loss
        self.h, h2 = self.encoder(v1), self.encoder(v2)          # [B,D] each
        self.z, z2 = self.projector(self.h), self.projector(h2)  # [B,P] each
        p1, p2 = self.predictor(self.z), self.predictor(z2)      # [B,P] each
        with torch.no_grad():                                    # in training mode: its own batch statistics
            t1, t2 = self.teacher(v1), self.teacher(v2)          # [B,P] each
        return direction(p1, t2) + direction(p2, t1)

    @torch.no_grad()
    def update_teacher(self, m):                                 # weights only, not BatchNorm's buffers
        student = nn.Sequential(self.encoder, self.projector)
        for t, s in zip(self.teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s, 1 - m)                                    # xi <- m xi + (1-m) theta


def build(cfg):
    return BYOL(make_encoder(cfg), cfg.hidden, cfg.dim, cfg.predictor)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {"independent": 4.}, optimizer)
    one = dict(scale=(cfg.crop, 1.), jitter=(.4, .4, .2, .1), grey=.2, blur=float(cfg.blur > 0))
    two = one | dict(blur=cfg.blur, solarise=cfg.solarise)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v1, v2 = views(x, **one), views(x, **two)
        with run.autocast():
            loss = model(v1, v2)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        m = cfg.m and cosine(step, run.total, cfg.m, 1.)
        method.update_teacher(m)
        run.log(loss, h=method.h, z=method.z, m=m)

    common.save_neighbours(run.folder / "neighbours.png", method.encoder, data)
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
