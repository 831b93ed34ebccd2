"""PixelCNN (2016): predict each pixel from those before it.

van den Oord, Kalchbrenner, Kavukcuoglu. Pixel Recurrent Neural Networks. ICML 2016, arXiv 1601.06759: masks.
van den Oord et al. Conditional Image Generation with PixelCNN Decoders. NIPS 2016, arXiv 1606.05328: gates,
and two stacks v and h; a single one is blind to a part of what is above to the right.

    x [B,3,H,W] -+-> v: rows so far, 7 x 7 ----> v: 3 x 3 ------> ...              encoder (kept)
                 |             | a row down           | a row down
                 +-> h: row to the left, A ----> h: mask B -----> ... [B,D,H,W] --head, B--> [B,256,3,H,W]
                 '------ the values 0 to 255, red, green, blue in order <--loss, bits per dimension-'

Good at: exact likelihoods of small images. Not at: speed, a sample takes 3HW passes; features: on the toys
those of the first layer get better, deeper ones are about the next value alone and get worse.

Run      python methods/pixelcnn.py
         5.40 ± .10 bits per dimension (histogram 7.67); 22 s on 2 cores
         linear 41.4 ± 1.3 % (untrained 36.4; each seed at least +3), k-NN 12.5 ± 1.9 (14.1), no better
Differs  the head sees the last layer only; no classes to condition on; images are flipped at random; beyond
         the border is the mean colour, and nothing says so; AdamW and its rate, gated layers at the depth and
         width of 1601.06759, with --paper as well; the quick run is small, at 12 x 12 pixels.
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
from common import Run, cosine, load_data, make_optimizer, parse, set_lr
from kernels.evaluation import histogram_nats
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    data: str = "toys:n=4000,noise=0"  # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    image_size: int = 12           # side of the images in pixels
    encoder: str = "gated"         # gated layers, the only choice: see width, depth
    steps: int = 1500              # optimisation steps
    batch_size: int = 8            # images a step, all processes together
    lr: float = 1e-2               # peak learning rate: linear warm-up, then half a cosine to 0
    width: int = 36                # D, channels of v and of h: a multiple of 3
    depth: int = 5                 # layers, the first of 7 x 7
    layer: int = 1                 # the layer whose mean is the feature


# 1601.06759: 15 layers of 3 x 3 after the first, 2h = 256 channels (here a multiple of 3). Steps and batch:
# 1606.05328's, for ImageNet. Neither gives a rate: it is ours.
PAPER = dict(data="cifar10", image_size=32, steps=200_000, batch_size=128, lr=1e-3, width=258, depth=16,
             layer=8)


class RowConv(nn.Conv2d):
    """k - 1 pixels to the left, and of the pixel itself the colours before (B: up to) one's own, i % 3."""

    def __init__(self, c_in, c_out, k=1, kind="B"):
        super().__init__(c_in, c_out, (1, k))
        own, seen = torch.arange(c_out)[:, None] % 3, torch.arange(c_in) % 3
        mask = torch.ones(c_out, c_in, 1, k)                     # 1 = seen
        mask[:, :, 0, -1] = seen < own if kind == "A" else seen <= own
        self.register_buffer("mask", mask)

    def forward(self, x):                                        # [B,C,H,W] -> [B,C',H,W]
        x = F.pad(x, (self.kernel_size[1] - 1, 0))               # to the left
        return F.conv2d(x, self.weight * self.mask, self.bias)


def gate(x):                                                     # [B,2C,H,W] -> [B,C,H,W]
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()                                # 1606.05328, Eq. 2


class GatedLayer(nn.Module):
    """v sees the rows down to its own; h its row, to the left, and through v the rows above."""

    def __init__(self, c_in, c, k, kind="B"):
        super().__init__()
        self.reach, self.residual = k // 2, kind == "B"
        self.vertical, self.link = nn.Conv2d(c_in, 2 * c, (k // 2 + 1, k)), nn.Conv2d(2 * c, 2 * c, 1)
        self.horizontal, self.out = RowConv(c_in, 2 * c, k // 2 + 1, kind), RowConv(c, c)

    def forward(self, v, h):                                     # [B,C,H,W] each -> [B,C',H,W] each
        a = self.vertical(F.pad(v, (self.reach, self.reach, self.reach, 0)))     # [B,2C',H,W]
        above = self.link(F.pad(a, (0, 0, 1, -1)))               # a row down: h sees none of its own
        out = self.out(gate(self.horizontal(h) + above))         # [B,C',H,W]
        return gate(a), h + out if self.residual else out


class GatedStack(nn.Module):
    def __init__(self, width, depth, layer):
        super().__init__()
        self.dim, self.layer = 2 * width, layer
        self.blocks = nn.ModuleList(GatedLayer(width, width, 3) if i else GatedLayer(3, width, 7, "A")
                                    for i in range(depth))

    def layers(self, x, depth=None):                             # [B,3,H,W] -> v, h of each layer, [B,2D,H,W]
        v, h, maps = x, x, []
        for block in self.blocks[:depth]:
            v, h = block(v, h)
            maps.append(torch.cat([v, h], 1))
        return maps

    def forward(self, x):                                        # [B,3,H,W] -> [B,2D]
        return self.layers(x, self.layer)[-1].mean((2, 3))


class PixelCNN(nn.Module):
    """encoder: has .dim, .layer and .layers(images): maps [B,dim,H,W], their second half, h, is causal."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, d = encoder, encoder.dim // 2
        self.head = nn.Sequential(nn.ReLU(), RowConv(d, d), nn.ReLU(), RowConv(d, 3 * 256))

    def logits(self, last):                                      # [B,2D,H,W] -> [B,256,3,H,W]
        return self.head(last.chunk(2, 1)[1]).float().unflatten(1, (256, 3))     # of h alone

    def forward(self, v):                                        # [B,3,H,W] -> loss, bits per dimension
        maps = self.encoder.layers(v)                            # [B,2D,H,W] each
        self.h = maps[self.encoder.layer - 1].mean((2, 3))       # [B,2D]
        x = (255 * denormalise(v)).round().long()                # [B,3,H,W], 0 to 255
        return F.cross_entropy(self.logits(maps[-1]), x) / math.log(2)


def build(cfg):
    if cfg.encoder != Config.encoder:
        common.fail(f"--encoder {cfg.encoder} does not fit: gated layers alone, see --width and --depth")
    if cfg.width % 3:
        common.fail(f"--width {cfg.width} would show a pixel its own colours: give a multiple of 3")
    if not 0 < cfg.layer <= cfg.depth:
        common.fail(f"--layer {cfg.layer}: give 1 to {cfg.depth}, or more layers by --depth")
    if cfg.weights:
        common.fail("--weights does not fit: no file is known for this encoder")
    return PixelCNN(GatedStack(cfg.width, cfg.depth, cfg.layer))


@torch.no_grad()
def draw_rows(method, images, first=0):                          # uint8 [B,3,H,W], rows drawn from `first` on
    x = images.clone()
    for i in range(first, x.shape[2]):
        for j, c in ((j, c) for j in range(x.shape[3]) for c in range(3)):
            last = method.encoder.layers(normalise(x[:, :, :i + 1]))[-1]         # [B,2D,i+1,W]
            logits = method.logits(last[:, :, i:, j:j + 1])[:, :, c, 0, 0]       # [B,256]
            x[:, c, i, j] = logits.softmax(1).multinomial(1)[:, 0].byte()
    return x


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    train, test = (x.flatten(1).long() for x in (data.images, data.test_images))         # [N,3HW] each
    histogram = histogram_nats(train, test, 256) / math.log(2)
    model = run.start(method, data, {"uniform": 8., "histogram": histogram}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=None, p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h)

    x, half = data.test_images[:8], data.test_images.shape[2] // 2
    common.save_grid(run.folder / "samples.png", {
        "real": x, "upper half": F.pad(x[:, :, :half], (0, 0, 0, x.shape[2] - half), value=128),
        "completed": draw_rows(method, x, half), "all drawn": draw_rows(method, x)})
    with torch.no_grad():                                        # the last part may be smaller
        bits = sum(len(x) * method(normalise(x)).item() for x in data.test_images.split(100))
    return run.finish(layers=True, bits=bits / len(data.test_images), bits_histogram=histogram)


if __name__ == "__main__":
    main(parse(Config, PAPER))
