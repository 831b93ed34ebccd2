"""SimCLR (2020): two views of an image find each other.

Two random views of an image must find each other among all other views of the batch.

Chen, Kornblith, Norouzi, Hinton. A Simple Framework for Contrastive Learning of Visual Representations.
ICML 2020, arXiv 2002.05709.

    x [B,3,H,W] --view--> v1 [B,3,H,W] --+
                --view--> v2 [B,3,H,W] --+--> encoder (kept) --> h [2B,D] --projector--> z [2B,P] --> NT-Xent
                                                                            row i: find i+B among 2B-1 others

Good at: image-level features, with neither labels nor a teacher. Not at: small batches (few negatives). It
ignores whatever the views change; without colour jitter it matches two crops by their colours alone.

Run      python methods/simclr.py
         linear 50.7 ± 1.8 % (untrained 27.2; each seed at least +21), k-NN 41.0 ± 1.0 (21.9); 71 s on 2 cores
Differs  pixels are normalised by mean and deviation; crops are resized bilinearly, not bicubically; the quick
         run has AdamW, half the colour strength, tau .2 and no blur.
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
from kernels.contrastive import nt_xent
from kernels.views import denormalise, views


@dataclass
class Config(common.Config):
    steps: int = 700               # optimisation steps
    hidden: int = 512              # width of the projector's hidden layer
    dim: int = 128                 # width of z
    tau: float = .2                # temperature of the similarities
    crop: float = .2               # smallest share of the image's area in a view
    color: float = .5              # strength s of the colour jitter (.8s, .8s, .8s, .2s)
    blur: float = 0.               # probability of a Gaussian blur, for images of 64 px and more


# Official code: rate .3 x B/256, warm-up 10 epochs; its loss is twice the mean of Eq. 1 that is used here.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=100, batch_size=4096,
             optimizer="lars", lr=4.8, weight_decay=1e-6, warmup=.1, hidden=2048, tau=.1, crop=.08, color=1.,
             blur=.5)


class SimCLR(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. gather: [B,P] -> the rows of all processes."""

    def __init__(self, encoder, hidden=512, dim=128, tau=.2, gather=lambda z: z):
        super().__init__()
        self.encoder, self.tau, self.gather = encoder, tau, gather
        self.projector = nn.Sequential(
            nn.Linear(encoder.dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim))

    def forward(self, v1, v2):                                   # [B,3,H,W] each -> loss
        self.h = self.encoder(torch.cat([v1, v2]))               # [2B,D]
        self.z = self.projector(self.h)                          # [2B,P]
        z1, z2 = F.normalize(self.z, dim=1).chunk(2)             # [B,P] each
        z = torch.cat([self.gather(z1), self.gather(z2)])        # [2B,P], of all processes
        # = cross_entropy(z @ z.T / tau with -inf on the diagonal, target i <-> i+B)             Eq. 1
        return nt_xent(z, self.tau)


def build(cfg):
    return SimCLR(make_encoder(cfg), cfg.hidden, cfg.dim, cfg.tau, common.gather)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {"ln(2B-1)": math.log(2 * cfg.batch_size - 1)}, optimizer)
    s = cfg.color
    options = dict(scale=(cfg.crop, 1.), jitter=(.8 * s, .8 * s, .8 * s, .2 * s), grey=.2, blur=cfg.blur)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v1, v2 = views(x, **options), views(x, **options)
        with run.autocast():
            loss = model(v1, v2)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, z=method.z)

    x = data.test_images[:10]
    v1, v2 = (denormalise(views(x, **options)) for _ in range(2))
    common.save_grid(run.folder / "views.png", {"x": x, "v1": v1, "v2": v2})
    common.save_neighbours(run.folder / "neighbours.png", method.encoder, data)
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
