"""Context prediction (2015): tell where a patch lies beside another.

Two patches of one image: in which of the eight cells around the first does the second lie?

Doersch, Gupta, Efros. Unsupervised Visual Representation Learning by Context Prediction.
ICCV 2015, arXiv 1505.05192.

    x [B,3,H,H] --3 x 3 grid, gaps, jitter--> --colours, contrast--> p [9B,3,P,P] --> encoder (kept) --.
        k in 0..7 [8B] <--loss-- logits [8B,8] <-- head <-- centre and neighbour [8B,2D] <-- h [B,9,D]

Good at: parts, and how they lie to each other, each patch seen by itself until the head. Not at: scenes whose
parts have no usual place. Lines that run on, contrast and the colour fringes of a lens tell the cell as well:
hence gaps and jitter, one contrast for all patches, and no green against magenta. The last is for lenses that
set green apart from red and blue; one that parts these two needs --colour drop. To see it cheat:

    python methods/context_prediction.py --aberration .06 --colour keep

Run      python methods/context_prediction.py
         k-NN 68.5 ± 2.5 % (untrained 25.7; each seed at least +40), linear 59.5 ± 0.8 (23.8); of the pairs of
         1,000 test images 37.8 ± 0.9 % are told right (chance 12.5); 34 s on 2 cores
         cheating: pairs 73.8 ± 2.6, k-NN 49.2 ± 1.3; with that lens, not keeping the colours: 39.7, 69.9
Differs  the encoder is a ResNet, its mean in place of fc6, and its BatchNorm has scales; a pair's first patch
         is the centre of a 3 x 3 grid, which alone has eight neighbours; views are resized crops, mirrored or
         not; no patch is reduced and enlarged again; the noise of --colour drop is the text's, Gaussian,
         not the code's, uniform; the rate follows a cosine.
"""
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.views import denormalise, normalise, views

RING = [0, 1, 2, 3, 5, 6, 7, 8]                                  # the cells around the centre, row by row


@dataclass
class Config(common.Config):
    data: str = "toys:n=10000"     # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    image_size: int = 64           # side of the images in pixels
    steps: int = 1200              # optimisation steps
    batch_size: int = 32           # images a step; each gives nine patches and eight pairs
    lr: float = 2e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    patch: int = 16                # side of a patch in pixels
    gap: int = 6                   # pixels between two patches, without jitter; 0 lets lines continue
    jitter: int = 2                # pixels that a patch is moved at most, up, down, left or right
    colour: str = "project"        # project: no green-magenta; drop: one channel and noise; keep: all
    equal: bool = True             # give all patches the same contrast
    hidden: int = 256              # width of the head
    crop: float = .7               # smallest share of the image's area in a view
    aberration: float = 0.         # a lens that shrinks green towards the image's centre by so much


# Official code; there the rate is 1e-5 for the sum over a batch's 2,240 pairs, here for the mean of its 448.
PAPER = dict(data="folder:imagenet", image_size=670, encoder="resnet18", steps=1_000_000, batch_size=56,
             optimizer="sgd", momentum=0., lr=2.2e-2, weight_decay=0., warmup=0., patch=96, gap=48, jitter=7,
             colour="drop", hidden=4096, crop=.35)


def cut(x, patch, gap, jitter):                                  # [B,3,S,S] -> [B,9,3,P,P]
    """A 3 x 3 grid in the middle, each patch moved by its own jitter."""
    shift = torch.randint(-jitter, jitter + 1, (2, len(x), 9), device=x.device)
    cell, start = torch.arange(9, device=x.device), (x.shape[3] - 3 * patch - 2 * gap) // 2
    row, col = start + (patch + gap) * torch.stack([cell // 3, cell % 3])[:, None] + shift   # [B,9] each
    windows = x.unfold(2, patch, 1).unfold(3, patch, 1)          # [B,3,S-P+1,S-P+1,P,P], a view
    return windows[torch.arange(len(x), device=x.device)[:, None], :, row, col]


def no_fringes(p, how, fixed=False):                             # [n,3,P,P] -> the same
    """Take out the colours in which a lens would tell where in the image a patch lies."""
    if how == "project":
        a = torch.tensor([-1., 2., -1.], device=p.device).view(3, 1, 1)  # green - magenta
        return p - a * (a * p).sum(1, keepdim=True) / 6          # I - a a^T / a^T a
    if how == "drop":
        place = torch.rand(len(p), 3, 1, 1, device=p.device).argsort(1)      # one channel of three, or green
        kept = (torch.arange(3, device=p.device).view(3, 1, 1) if fixed else place) == 1
        std = p.std((2, 3), keepdim=True).masked_fill(~kept, 0).sum(1, keepdim=True)
        return p.where(kept, torch.randn_like(p) * std / 100)
    return p


def equalise(p):                                                 # [n,3,P,P]: means 0, root mean square 1
    p = p - p.mean((2, 3), keepdim=True)
    return p / (p.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-3)


def aberrate(x, k):                                              # uint8 [N,3,H,W] -> the same
    """As through a lens that shows green smaller by 1 - k about the image's centre than red and blue."""
    theta = torch.eye(2, 3, device=x.device)[None] / (1 - k)
    grid = F.affine_grid(theta, [1, 1, *x.shape[2:]], align_corners=False)       # [1,H,W,2]
    green = x[None, :, 1].float()                                # [1,N,H,W] the images are channels of one
    green = F.grid_sample(green, grid, padding_mode="reflection", align_corners=False)
    return torch.stack([x[:, 0], green[0].round().byte(), x[:, 2]], 1)


class NinePatches(nn.Module):
    """What is kept: an image as nine patches, their features side by side, as the head sees pairs of them.
    encoder: patches [n,3,P,P] -> [n,encoder.dim]; it has never seen anything but patches."""

    def __init__(self, encoder, patch, gap, jitter, colour, equal):
        super().__init__()
        self.encoder, self.dim, self.side = encoder, 9 * encoder.dim, 3 * patch + 2 * (gap + jitter)
        self.patch, self.gap, self.colour, self.equal = patch, gap, colour, equal

    def cut(self, x, jitter=0):                                  # normalised [B,3,H,H] -> [9B,3,P,P] in 0..1
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return cut(denormalise(x), self.patch, self.gap, jitter).flatten(0, 1)

    def prepare(self, p):                                        # [n,3,P,P] -> the same
        p = no_fringes(p, self.colour, fixed=not self.training)
        return equalise(p) if self.equal else p

    def forward(self, x):                                        # [B,3,H,H] -> [B,9D]
        return rearrange(self.encoder(self.prepare(self.cut(x))), "(b n) d -> b (n d)", n=9)

    def layers(self, x):                                         # the patches' maps in place, [B,C,3h,3w]
        return [rearrange(a, "(b i j) c h w -> b c (i h) (j w)", i=3, j=3)
                for a in self.encoder.layers(self.prepare(self.cut(x)))]


class ContextPrediction(nn.Module):
    """encoder: patches [n,3,P,P] -> [n,encoder.dim]. Images are square."""

    def __init__(self, encoder, patch=16, gap=6, jitter=2, colour="project", equal=True, hidden=256):
        super().__init__()
        self.encoder, self.jitter = NinePatches(encoder, patch, gap, jitter, colour, equal), jitter
        self.head = nn.Sequential(nn.Linear(2 * encoder.dim, hidden, bias=False),        # fc7 to fc9
                                  nn.BatchNorm1d(hidden, affine=False), nn.ReLU(),
                                  nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 8))

    def solve(self, v):                                          # [B,3,H,H] -> logits [8B,8]
        nine = self.encoder
        self.h = nine.encoder(nine.prepare(nine.cut(v, self.jitter)))    # [9B,D], no patch sees another
        h = rearrange(self.h, "(b n) d -> b n d", n=9)           # [B,9,D]
        pairs = torch.cat([h[:, [4] * 8], h[:, RING]], 2)        # [B,8,2D] late fusion
        return self.head(pairs.flatten(0, 1))                    # [8B,8]

    def forward(self, v):                                        # [B,3,H,H] -> loss
        logits = self.solve(v)                                   # [8B,8]
        k = torch.arange(8, device=v.device).repeat(len(v))      # [8B]
        self.accuracy = (logits.argmax(1) == k).float().mean()
        return F.cross_entropy(logits, k)


def build(cfg):
    if cfg.colour not in ("project", "drop", "keep"):
        common.fail(f"--colour {cfg.colour} is unknown: give project, drop or keep")
    encoder = make_encoder(replace(cfg, image_size=cfg.patch))
    return ContextPrediction(encoder, cfg.patch, cfg.gap, cfg.jitter, cfg.colour, cfg.equal, cfg.hidden)


@torch.no_grad()
def pairs_right(method, images):                                 # uint8 [N,3,H,H] -> %, chance is 12.5
    said = torch.cat([method.eval().solve(normalise(x)).argmax(1) for x in images.split(100)])   # [8N]
    return common.percent(said.view(-1, 8), torch.arange(8, device=said.device))


@torch.no_grad()
def alike(encoders, images, bank, n=9):
    """Rows: of each image the patch with most contrast, and those of the bank nearest to it, by encoder."""
    rows = {}
    for name, nine in encoders.items():
        p, q = nine.cut(normalise(bank)), nine.cut(normalise(images)).unflatten(0, (-1, 9))
        q = q[torch.arange(len(q)), q.std((2, 3, 4)).argmax(1)]  # [m,3,P,P]
        h, z = (F.normalize(nine.eval().encoder(nine.prepare(x)), dim=1) for x in (p, q))
        for i, nearest in enumerate((z @ h.T).topk(n).indices, 1):
            rows[f"patch {i}, {name}"] = torch.cat([q[i - 1:i], p[nearest]])
    return dict(sorted(rows.items()))


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    if cfg.aberration:
        x, y = (aberrate(x, cfg.aberration) for x in (data.images, data.test_images))
        data = data._replace(images=x, test_images=y)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {"ln 8": math.log(8)}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, method.encoder.side, scale=(cfg.crop, 1.), ratio=(1, 1), p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, accuracy=method.accuracy)

    encoders = {"trained": method.encoder, "untrained": run.untrained}
    common.save_grid(run.folder / "alike.png", alike(encoders, data.test_images[:5], data.images[:1000]),
                     "a patch of a test image, and the nearest patches of other images in feature space")
    return run.finish(layers=True, pairs_right=pairs_right(method, data.test_images))


if __name__ == "__main__":
    main(parse(Config, PAPER))
