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
         linear 50.6 ± 2.3 % (untrained 27.2; each seed at least +21), k-NN 40.3 ± 0.5 (21.9); 64 s on 2 cores
Differs  pixels are normalised; crops are bilinear, not bicubic; blur mirrors the border; the last BatchNorm
         has a shift, blocks do not start as the identity; half the code's loss: biases, norms learn half as
         fast; the quick run has AdamW, larger crops, half the colour strength, tau .2 and no blur.
"""
import math
import os
import sys
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
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
    only: str = ""                 # view 1 has only these of crop,flip,color,grey,blur,solarise; view 2 none
    matrix: bool = False           # a run for each pair of them, as one picture (Figure 5)


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


NONE = dict(scale=None, flip=0., p_jitter=0., grey=0., blur=0.)
ONE = dict(crop=dict(scale=(.2, 1.)), flip=dict(flip=.5), color=dict(p_jitter=.8), grey=dict(grey=.5),
           blur=dict(blur=.5), solarise=dict(solarise=.5))


def only(names, options):
    """Options of views() with the transformations that "crop,color" names, and no others."""
    if unknown := set(names.split(",")) - set(ONE):
        common.fail(f"--only {','.join(unknown)} is unknown: give some of {','.join(ONE)}")
    one = ONE | dict(crop=dict(scale=options["scale"]), blur=dict(blur=options["blur"] or .5))
    return options | NONE | {k: v for name in names.split(",") for k, v in one[name].items()}


def matrix(cfg):
    """Figure 5 (there all views are cropped): the probe where view 1 has i and j, view 2 none; averages."""
    from matplotlib.figure import Figure
    if "RANK" in os.environ:
        common.fail("--matrix is many runs, one after the other: start it without torchrun")
    names, n = list(ONE), len(ONE)
    a = torch.zeros(n, n + 1)
    for i, j in combinations_with_replacement(range(n), 2):
        out = Path(cfg.out, "matrix", f"{i}{j}")
        begun = cfg.resume and any(out.glob("*/checkpoint.pt"))
        found = main(replace(cfg, matrix=False, only=f"{names[i]},{names[j]}", out=str(out), resume=begun))
        if "linear" not in found:
            common.fail(f"--matrix needs labels, for its probes, which --data {cfg.data} has not")
        a[i, j] = a[j, i] = found["linear"]
    a[:, n] = a[:, :n].mean(1)
    figure = Figure((5.6, 4.4), layout="tight")
    axis = figure.subplots()
    axis.imshow(a.numpy())
    for i, j in torch.cartesian_prod(torch.arange(n), torch.arange(n + 1)).tolist():
        axis.text(j, i, f"{a[i, j]:.1f}", ha="center", va="center", color="wk"[int(a[i, j] > a.median())])
    axis.set(xticks=range(n + 1), yticks=range(n), xticklabels=[*names, "average"], yticklabels=names)
    common.write(Path(cfg.out, "matrix.png"), lambda f: figure.savefig(f, dpi=110))


def build(cfg):
    return SimCLR(make_encoder(cfg), cfg.hidden, cfg.dim, cfg.tau, common.gather)


def main(cfg):
    if cfg.matrix:
        return matrix(cfg)
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {"ln(2B-1)": math.log(2 * cfg.batch_size - 1)}, optimizer)
    s = cfg.color
    options = dict(scale=(cfg.crop, 1.), jitter=(.8 * s, .8 * s, .8 * s, .2 * s), grey=.2, blur=cfg.blur)
    one, two = (only(cfg.only, options), options | NONE) if cfg.only else (options, options)

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

    x = data.test_images[:10]
    v1, v2 = (denormalise(views(x, **options)) for options in (one, two))
    common.save_grid(run.folder / "views.png", {"x": x, "v1": v1, "v2": v2})
    common.save_neighbours(run.folder / "neighbours.png", method.encoder, data)
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
