"""Video colorization (2018): colour a frame by copying from earlier ones.

A thing keeps its colour while it moves. A pointer that copies the right colour has found the thing again, and
then carries masks and points through a clip as well.

Vondrick, Shrivastava, Fathi, Guadarrama, Murphy. Tracking Emerges by Colorizing Videos.
ECCV 2018, arXiv 1806.09594.

    x [B,4,3,H,W] --grey--> encoder (kept), places --> f [B,4,N,D] --softmax over i of f_i f_j--> A [B,N,3N]
      |                                                   i: places of three frames, j: of the fourth  |
      '--colours, one of 16--> c [B,4,N] --those of the three, c_i--> copied: y_j = sum_i A_ij c_i [B,N,16]
                                 '--those of the fourth, c_j [B,N] --loss: -log y_j[c_j]-----------------'

Good at: following what the first frame marks, without a label in training. Not at: surfaces of one grey
without texture, or features that tell classes apart.

Run      python methods/video_colorization.py
         J of carried masks .630 ± .003 (untrained, by its nearest cosines, .361; standing still .271),
         points .878 ± .003 (.680; .506), on each seed at least +.25 and +.18;
         on grey stills linear 31.3 ± 0.9 % (untrained 23.1), k-NN 23.6 ± 1.8 (24.2); 35 s on 2 cores
Differs  the maps of all stages, brought to one size and added, stand for a ResNet-18 of stride 8; two 1x1
         convolutions, each frame alone, for five blocks of 3-D convolutions over all four; drawn clips, of
         which any four frames are taken, in order, for Kinetics at 6 frames a second; the rate is a cosine's.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.cluster.vq import kmeans2
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.colour import lab_to_rgb, rgb_to_lab
from kernels.views import normalise, unit


@dataclass
class Config(common.Config):
    data: str = "toys:objects=3,frames=6,n=4000"  # clips: toys of four frames and more
    steps: int = 700               # optimisation steps
    lr: float = 5e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    batch_size: int = 16           # clips a step, four frames of each
    colours: int = 16              # clusters of colours
    grid: int = 16                 # side of the feature map
    dim: int = 64                  # channels of the feature map
    tau: float = .5                # temperature of the pointer in tests; in training it is 1


# The text: Adam, 1e-3, after 60,000 steps 1e-4. Its clips are Kinetics, which has no loader here: drawn ones.
PAPER = dict(image_size=256, encoder="resnet18", steps=400_000, batch_size=32, lr=1e-3, weight_decay=0.,
             warmup=0., grid=32)


def grey_and_ab(x, grid):                                        # [N,3,H,W] -> [N,3,H,W], [N,2,g,g]
    """The lightness, three times over: all that the encoder sees. The colours: means of g x g cells."""
    lab = rgb_to_lab(unit(x))
    return (lab[:, :1] / 100).expand(-1, 3, -1, -1), F.adaptive_avg_pool2d(lab[:, 1:], grid)


def vocabulary(clips, grid, k):                                  # uint8 [n,T,3,H,W] -> [k,2]
    """k-means of the colours of 2,000 frames: one for all clips, so that a colour has one name."""
    x = clips.flatten(0, 1)
    _, ab = grey_and_ab(x[torch.randperm(len(x))[:2000].to(x.device)], grid)
    ab = rearrange(ab, "n c h w -> (n h w) c").double().cpu()
    ab = ab[torch.randperm(len(ab))[:100_000]]
    return torch.from_numpy(kmeans2(ab.numpy(), k, minit="++", seed=0)[0])


def attend(target, reference, labels, tau=1.):                   # [B,M,D], [B,N,D], [B,N,K] -> [B,M,K]
    with torch.autocast(target.device.type, enabled=False):      # in fp32
        a = (target @ reference.mT / tau).softmax(2)             # [B,M,N]  A_ij, sums to 1 over references i
        return a @ labels                                        # y_j = sum_i A_ij c_i


def copied_colours(f, c, k):                                     # [B,T,N,D], [B,T,N] -> loss, y [B,N,k]
    """The last frame's colours, copied from all places of the others. y is a probability: no softmax here."""
    y = attend(f[:, -1], f[:, :-1].flatten(1, 2), F.one_hot(c[:, :-1].flatten(1), k).float())
    return F.nll_loss(y.clamp_min(1e-6).log().mT, c[:, -1]), y   # a colour that no reference has costs 13.8


def carry(f, first, tau):                                        # [B,T,N,D], [B,N,K] -> [B,T,N,K]
    """Labels of the first frame through the clip: a frame copies from the first and the one before it."""
    y = [first]
    for t in range(1, f.shape[1]):
        i = [0, t - 1][:t]
        y.append(attend(f[:, t], f[:, i].flatten(1, 2), torch.cat([y[j] for j in i], 1), tau))
    return torch.stack(y, 1)


class VideoColorization(nn.Module):
    """encoder: has .layers(images [B,3,H,W]), a list of maps [B,C,h,w]. colours: set them to the centres of
    k-means of a and b."""

    def __init__(self, encoder, colours=16, grid=16, dim=64):
        super().__init__()
        self.encoder, self.grid = encoder, grid
        with torch.no_grad():
            x = next(encoder.parameters(), torch.empty(0)).new_zeros(1, 3, 64, 64)
            widths = [a.shape[1] for a in encoder.eval().layers(x)]
        encoder.train()
        self.register_buffer("places", (2 * places(grid) - 1)[None])     # [1,2,g,g], -1..1
        self.register_buffer("colours", torch.zeros(colours, 2))         # a and b of each
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in (*widths, 2))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def embed(self, v):                                          # [B,T,3,H,W] -> [B,T,N,D], N = g g
        maps = self.encoder.layers(v.flatten(0, 1))              # [BT,C,h,w] each
        self.h = maps[-1].mean((2, 3))                           # [BT,C]
        maps = [F.interpolate(lateral(a), self.grid, mode="bilinear")                    # [BT,D,g,g] each
                for lateral, a in zip(self.lateral, [*maps, self.places], strict=True)]
        return rearrange(self.head(sum(maps)), "(b t) d h w -> b t (h w) d", b=len(v)).float()

    def prepare(self, x):                                        # uint8 [B,T,3,H,W] -> v, c of forward
        grey, ab = grey_and_ab(x.flatten(0, 1), self.grid)       # [BT,3,H,W], [BT,2,g,g]
        c = torch.cdist(rearrange(ab, "n c h w -> n (h w) c"), self.colours).argmin(2)   # the nearest
        return normalise(grey).unflatten(0, x.shape[:2]), c.unflatten(0, x.shape[:2])

    def forward(self, v, c):                                     # grey [B,T,3,H,W], colours [B,T,N] -> loss
        loss, y = copied_colours(self.embed(v), c, len(self.colours))
        self.accuracy = (y.argmax(2) == c[:, -1]).float().mean()
        return loss


def build(cfg):
    vit = dict(pool="mean") if cfg.encoder.startswith("vit") else {}     # of the patches, which learn
    return VideoColorization(make_encoder(cfg, **vit), cfg.colours, cfg.grid, cfg.dim)


def places(size):                                                # x and y of pixels in sides, [2,S,S]
    axis = (torch.arange(size) + .5) / size
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"))


@torch.no_grad()
def follow(method, x, labels, tau, cosine=False):                # [B,T,3,H,W], [B,K,H,W] -> [B,T,K,H,W]
    """Any labels of the pixels of the first frame, carried through the clips x."""
    y = []
    for x_i, first in zip(x.split(50), labels.split(50), strict=True):
        f = method.eval().embed(method.prepare(x_i)[0])          # [50,T,N,D]
        first = F.adaptive_avg_pool2d(first, method.grid).flatten(2).mT                  # [50,N,K]
        y.append(carry(F.normalize(f, dim=3) if cosine else f, first, tau))
    y = rearrange(torch.cat(y), "b t (h w) k -> (b t) k h w", h=method.grid)
    return F.interpolate(y, x.shape[3:], mode="bilinear").unflatten(0, x.shape[:2])


def marks(masks):                                                # [B,T,H,W] -> [B,k+3,H,W]
    """What is carried from the first frame: one-hot, which toy a pixel is of, 0 for none; its x and y."""
    toy = F.one_hot(masks.long())[:, 0].movedim(3, 1)
    at = places(masks.shape[-1]).to(masks.device)                # [2,H,W]
    return torch.cat([toy, at.expand(len(toy), -1, -1, -1)], 1)


def scores(y, masks, radius=.1):                                 # carried marks [B,T,k+3,H,W], [B,T,H,W]
    """J: |both| / |either| of a toy's carried and true mask, the mean over toys and frames after the first.
    Points: the share of the toys' pixels that point to where they were at first, within `radius` sides."""
    k, at = y.shape[2] - 3, places(masks.shape[-1]).to(masks.device)
    toy, found = (F.one_hot(m.long(), k + 1)[..., 1:].float() for m in (masks, y[:, :, :-2].argmax(2)))
    toy = toy * toy[:, :1].amax((2, 3), keepdim=True)            # [B,T,H,W,k], toys that the first frame has
    size = toy.sum((2, 3))                                       # [B,T,k]
    j = (toy * found).sum((2, 3)) / toy.maximum(found).sum((2, 3)).clamp(min=1)       # [B,T,k]
    middle = torch.einsum("bthwk,chw->btkc", toy, at) / size.clamp(min=1)[..., None]  # in sides
    moved = torch.einsum("bthwk,btkc->btchw", toy, middle - middle[:, :1])    # [B,T,2,H,W]
    hit = (y[:, :, -2:] - (at - moved)).norm(dim=2) < radius     # [B,T,H,W]
    return j[:, 1:][size[:, 1:] > 0].mean().item(), hit[:, 1:][toy[:, 1:].sum(4) > 0].float().mean().item()


def picture(method, x, masks, tau):                              # rows of the clips' frames, side by side
    first = torch.cat([marks(masks)[:, :-2], rgb_to_lab(unit(x[:, 0]))[:, 1:]], 1)
    y, (grey, _) = follow(method, x, first, tau).flatten(0, 1), grey_and_ab(x.flatten(0, 1), 1)
    inks = torch.cat([torch.zeros(1, 3), torch.eye(3).repeat(len(first[0]), 1)]).to(x.device)
    toys = [.5 * grey + .5 * inks[m.long()].movedim(3, 1) for m in (y[:, :-2].argmax(1), masks.flatten(0, 1))]
    copied = lab_to_rgb(torch.cat([100 * grey[:, :1], y[:, -2:]], 1))
    return {"grey, as seen": grey, "colours carried": copied,
            "true colours": x.flatten(0, 1), "masks carried": toys[0], "true masks": toys[1]}


def grey_stills(cfg, n, device):
    """Labelled images for the table, as grey as what the encoder saw."""
    data = load_data(replace(cfg, data=f"toys:n={n}"), device)
    grey = [torch.cat([(255 * grey_and_ab(x_i, 1)[0]).round().byte() for x_i in x.split(1000)])
            for x in (data.images, data.test_images)]
    return data._replace(images=grey[0], test_images=grey[1])


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    if data.images.ndim < 5 or data.images.shape[1] < 4:
        common.fail("this takes clips of four frames and more: give --data toys:frames=6")
    method = build(cfg).to(run.device)
    method.colours.copy_(vocabulary(data.images, cfg.grid, cfg.colours))
    optimizer = make_optimizer(cfg, method)
    test, masks = data.test_images, data.test_masks
    first = marks(masks)                                         # [M,k+3,H,W]
    # An untrained network's dot products only tell lengths (J is 0): its nearest by cosine serve it best.
    carried = {"standing still": first[:, None].expand(-1, test.shape[1], -1, -1, -1),
               "untrained": follow(method, test, first, 1e-3, cosine=True)}
    _, c = method.prepare(data.images[:500, :4])
    histogram, _ = copied_colours(torch.zeros(*c.shape, 1, device=run.device), c, cfg.colours)   # f constant
    model = run.start(method.train(), data, {"histogram": histogram.item()}, optimizer)
    run.data = grey_stills(cfg, 5 * len(data.images), run.device)        # 20,000, as every method has

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,T,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        frames = torch.rand(x.shape[:2]).argsort(1)[:, :4].sort(1).values        # [B,4]
        v, c = method.prepare(x[torch.arange(len(x))[:, None], frames])
        with run.autocast():
            loss = model(v, c)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, accuracy=method.accuracy)

    common.save_grid(run.folder / "carried.png", picture(method, test[:2], masks[:2], cfg.tau),
                     "two test clips: the colours and masks of each one's first frame, carried on")
    carried[run.name] = follow(method, test, first, cfg.tau)
    table = {f"{what}, {who}": value for who, y in carried.items()
             for what, value in zip(("J", "points"), scores(y, masks), strict=True)}
    with torch.no_grad():
        test_loss = method(*method.prepare(test[:100, :4])).item()
    return run.finish(layers=True, test_loss=test_loss, **table)


if __name__ == "__main__":
    main(parse(Config, PAPER))
