"""Jigsaw (2016): tell how nine tiles were shuffled.

Cut an image into nine tiles, shuffle them by one of a fixed set of permutations, and classify which.

Noroozi, Favaro. Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles.
ECCV 2016, arXiv 1603.09246.

    x [B,3,H,W] --3 x 3 cells, a tile in each--> [B,9,3,P,P] --order k--> encoder (kept) --> h [9B,D]
              k in 0..K-1 [B] <--loss-- logits [B,K] <-- head <-- nine side by side [B,9D'] <-- fc6 <-'

Good at: parts and where they belong, each tile seen by itself until the last layers. Not at: scenes without
parts that have a place. It would rather match the lines, brightness and colour of neighbours: hence a random
gap between tiles, each tile's own mean and contrast, channels shifted against each other, grey images.
The orders lie as far apart as a greedy choice gets them: any two of the 64 differ in at least 7 of 9 places.

Run      python methods/jigsaw.py
         k-NN 55.6 ± 1.6 % (untrained 28.5; each seed at least +24), linear 47.7 ± 1.1 (24.2); of 800 test
         puzzles 76.0 ± 0.6 % are solved (chance 1.6); 28 s on 2 cores
Differs  the encoder is a ResNet, and fc6 and fc7 have BatchNorm; orders are chosen by their least distance,
         not their mean one; grey images, but no random projections of colours; views are resized crops;
         momentum is Nesterov's, biases and norms do not decay; the rate follows a cosine;
         probes see nine tiles, not a whole image, which the encoder has never seen.
"""
import math
import sys
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    data: str = "toys:n=8000"      # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    image_size: int = 64           # side of the images in pixels
    steps: int = 500               # optimisation steps
    batch_size: int = 64           # images a step; each is one puzzle of nine tiles
    lr: float = 3e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    orders: int = 64               # K, how many permutations there are to tell apart
    gap: float = .25               # share of a cell's side that its tile lacks: 16 pixels of 21
    fringe: int = 1                # pixels that a tile's channels are shifted against each other at most
    equal: bool = True             # give every channel of every tile mean 0 and deviation 1
    grey: float = .3               # probability that an image is grey
    hidden: int = 256              # width of fc7; fc6 has a quarter of it
    dropout: float = 0.            # of fc6 and fc7
    crop: float = .5               # smallest share of the image's area in a view


# Official code, where a tile has 64 of a cell's 85 pixels; it has 100 or 701 orders, the text 1,000.
PAPER = dict(data="folder:imagenet", image_size=256, encoder="resnet18", steps=350_000, batch_size=256,
             optimizer="sgd", lr=.01, weight_decay=5e-4, warmup=0., orders=1000, fringe=2, grey=.5,
             hidden=4096, dropout=.5)


def distant_orders(k):                                           # -> [k,9]
    """Permutations of nine, the same in every run: each differs from the nearest of those before it in as
    many places as can be; of several such, it is the farthest from all. The first is 0 to 8 as they are."""
    every = np.array(list(permutations(range(9))), np.uint8).T.copy()    # [9,362880]
    nearest, total, chosen = np.full(every.shape[1], 9, np.int32), np.zeros(every.shape[1], np.int32), [0]
    while len(chosen) < k:
        distance = (every != every[:, chosen[-1:]]).sum(0, dtype=np.uint8)       # [362880] to the last chosen
        nearest, total = np.minimum(nearest, distance), total + distance
        chosen.append((10 * k * nearest + total).argmax())       # total < 10 k: it decides between equals
    return torch.from_numpy(every[:, chosen].T.astype(np.int64))


def least_distance(orders):                                      # [K,9] -> int
    return (orders[:, None] != orders).sum(2).fill_diagonal_(9).min().item()


def cut(x, p, fringe=None):                                      # [B,3,H,H] -> tiles [B,9,3,P,P]
    """A tile from a random place in each cell of a 3 x 3 grid, its channels up to `fringe` pixels apart; from
    the middle where fringe is None."""
    c, n = x.shape[2] // 3, len(x)
    room = c - p
    at = torch.full((2, n, 9, 3), room // 2, device=x.device)    # row and column in the cell
    if fringe is not None:
        fringe = min(fringe, room)
        at = torch.randint(room - fringe + 1, (2, n, 9, 1), device=x.device)     # the tile's place, and
        at = at + torch.randint(fringe + 1, (2, n, 9, 3), device=x.device)       # each of its channels'
    cells = rearrange(x[..., :3 * c, :3 * c], "b c (i h) (j w) -> b (i j) c h w", i=3, j=3)  # [B,9,3,c,c]
    windows = cells.unfold(3, p, 1).unfold(4, p, 1)              # [B,9,3,c-P+1,c-P+1,P,P], a view
    image, cell, channel = (torch.arange(size, device=x.device) for size in (n, 9, 3))
    return windows[image[:, None, None], cell[:, None], channel, at[0], at[1]]


def equalise(p):                                                 # [...,P,P]: mean 0, deviation 1
    p = p - p.mean((-2, -1), keepdim=True)
    return p / (p.square().mean((-2, -1), keepdim=True).sqrt() + .05)     # .05: flat tiles stay flat


def reorder(p, order):                                           # [B,9,...], [B,9] -> place j: tile order[j]
    return p[torch.arange(len(p), device=p.device)[:, None], order]


class NineTiles(nn.Module):
    """What is kept: an image as nine tiles of p pixels, their features side by side, as the head sees them.
    encoder: tiles [n,3,P,P] -> [n,encoder.dim]; it has never seen anything but tiles."""

    def __init__(self, encoder, p, equal=True):
        super().__init__()
        self.encoder, self.dim, self.p, self.equal = encoder, 9 * encoder.dim, p, equal

    def prepare(self, tiles):                                    # [B,9,3,P,P] -> [9B,3,P,P]
        return (equalise(tiles) if self.equal else tiles).flatten(0, 1)

    def forward(self, x):                                        # [B,3,H,H] -> [B,9D]
        return rearrange(self.encoder(self.prepare(cut(x, self.p))), "(b n) d -> b (n d)", n=9)

    def layers(self, x):                                         # the tiles' maps in place, [B,C,3h,3w]
        return [rearrange(a, "(b i j) c h w -> b c (i h) (j w)", i=3, j=3)
                for a in self.encoder.layers(self.prepare(cut(x, self.p)))]


class Jigsaw(nn.Module):
    """encoder: tiles [n,3,P,P] -> [n,encoder.dim]. orders: permutations [K,9]. Images are square."""

    def __init__(self, encoder, orders, p, fringe=1, equal=True, hidden=256, dropout=0.):
        super().__init__()
        self.encoder, self.fringe = NineTiles(encoder, p, equal), fringe
        self.register_buffer("orders", orders)
        self.fc6 = nn.Sequential(nn.Linear(encoder.dim, hidden // 4, bias=False), nn.BatchNorm1d(hidden // 4),
                                 nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Sequential(nn.Linear(9 * (hidden // 4), hidden, bias=False), nn.BatchNorm1d(hidden),
                                  nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, len(orders)))

    def shuffle(self, v):                                        # [B,3,H,H] -> tiles [B,9,3,P,P], k [B]
        k = torch.randint(len(self.orders), (len(v),), device=v.device)
        return reorder(cut(v, self.encoder.p, self.fringe), self.orders[k]), k

    def solve(self, tiles):                                      # shuffled [B,9,3,P,P] -> logits [B,K]
        self.h = self.encoder.encoder(self.encoder.prepare(tiles))       # [9B,D], no tile sees another
        return self.head(rearrange(self.fc6(self.h), "(b n) d -> b (n d)", n=9))

    def forward(self, v):                                        # [B,3,H,H] -> loss
        tiles, k = self.shuffle(v)
        logits = self.solve(tiles)                               # [B,K]
        self.accuracy = (logits.argmax(1) == k).float().mean()
        return F.cross_entropy(logits, k)


def build(cfg):
    p = round((1 - cfg.gap) * (cfg.image_size // 3))
    if p < 1 or not 1 < cfg.orders <= math.factorial(9):
        common.fail(f"--gap must leave some of {cfg.image_size // 3} pixels, --orders be 2 to 362880")
    encoder, orders = make_encoder(replace(cfg, image_size=p)), distant_orders(cfg.orders)
    return Jigsaw(encoder, orders, p, cfg.fringe, cfg.equal, cfg.hidden, cfg.dropout)


def picture(tiles):                                              # [B,9,3,P,P] -> images with white seams
    tiles = F.pad(denormalise(tiles), (1, 1, 1, 1), value=1)
    return rearrange(tiles, "b (i j) c h w -> b c (i h) (j w)", i=3, j=3)


@torch.no_grad()
def puzzles(method, images, n=5):
    """n puzzles that were solved and n that were not, put together as the network says; % solved."""
    tiles, k = method.eval().shuffle(normalise(images))          # [M,9,3,P,P], [M]
    said = torch.cat([method.solve(part).argmax(1) for part in tiles.split(100)])    # [M]
    show = torch.cat([(said == k).nonzero()[:n, 0], (said != k).nonzero()[:n, 0]])
    solution = reorder(tiles[show], method.orders[said[show]].argsort(1))    # argsort inverts an order
    rows = {"image": images[show], "shuffled": picture(tiles[show]), "as the network says": picture(solution)}
    return rows, common.percent(said, k)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    run.print(f"{cfg.orders} orders of nine tiles; any two differ in {least_distance(method.orders)} or more")
    model = run.start(method, data, {f"ln {cfg.orders}": math.log(cfg.orders)}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), ratio=(1, 1), flip=0, p_jitter=0, grey=cfg.grey)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, accuracy=method.accuracy)

    rows, accuracy = puzzles(method, data.test_images[:1000])
    common.save_grid(run.folder / "puzzles.png", rows, "puzzles of test images: solved ones, then others")
    return run.finish(layers=True, puzzles_right=accuracy)


if __name__ == "__main__":
    main(parse(Config, PAPER))
