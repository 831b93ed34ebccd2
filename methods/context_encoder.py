"""Context Encoder (2016): paint what was cut out, from its surroundings.

A region of an image is cut out, and an encoder and a decoder paint it from what is left around it.

Pathak, Krähenbühl, Donahue, Darrell, Efros. Context Encoders: Feature Learning by Inpainting.
CVPR 2016, arXiv 1604.07379.

    v [B,3,H,W] --hole: mean colour--> encoder (kept) --> [B,m,n,n] --each channel: all places to all, 1x1,
     |                                                                 up-convolutions, tanh--> y [B,3,P,P]
     '--> t [B,3,P,P] --loss: L2 in the hole--> y          P = H/2 for the centre block, H for random regions
               '-------> discriminator: t or y? [B,1,1,1] <-- y                          (it sees no context)

Good at: guessing what stands behind a hole; features of what belongs together. Not at: sharpness by L2 alone,
which paints the mean of all that could be there; the adversarial loss (--adversarial .001) picks one, at a
cost in error. The encoder never sees a whole image in training.

Run      python methods/context_encoder.py
         linear 38.0 ± 1.9 % (untrained 27.2; each seed at least +8), k-NN 31.7 ± 0.7 (21.9); 33 s on 2 cores
         squared error in the hole .074, of the smoothest continuation of its border .078, mean colour .189
         --adversarial .001: linear 35.8 ± 1.3, k-NN 30.3 ± 1.3, error .081
Differs  a ResNet for AlexNet up to pool5; the channel-wise layer starts as the identity; the decoder halves
         the channels; random regions are the official code's noise, not the text's shapes of PASCAL objects,
         an own one an image; no bottleneck of 4,000, as that code has; holes have the data's mean colour, not
         ImageNet's; both steps of a batch share one pass, as in the official code; views are resized crops,
         with --paper as well (the code: 128 of 350 pixels); AdamW, the rate follows a cosine.
"""
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    steps: int = 1300              # optimisation steps
    batch_size: int = 64           # images a step, all processes together
    lr: float = 2e-3               # peak learning rate; the discriminator's is a tenth
    momentum: float = .5           # beta1 of adamw
    adversarial: float = 0.        # weight of the adversarial loss, .001 in the paper; 0: L2 alone
    region: str = "centre"         # what is hidden: the centre block, or random regions, a quarter in all
    overlap: int = 2               # width of the centre block's border that is seen, and painted all the same
    cells: int = 4                 # cells of noise a side: fewer make larger random regions
    crop: float = .7               # smallest share of the image's area in a view


# The official code's command for centre blocks; the text's overlap is 7. For features the text has random
# regions and L2 alone: --region random --adversarial 0.
PAPER = dict(data="folder:imagenet", image_size=128, encoder="resnet18", epochs=500, weight_decay=0.,
             warmup=0., adversarial=.001, overlap=4, cells=8)


def centred(x, size):                                            # [B,C,S,S] -> [B,C,size,size]
    return F.pad(x, 4 * [(size - x.shape[-1]) // 2])             # its middle, or in the middle of zeros


def draw_masks(cfg, n):                                          # -> bool [n,1,H,W], True = hidden
    """Random: the lowest quarter of enlarged noise, cut out anywhere, so that no place is special."""
    side = cfg.image_size
    if cfg.region == "centre":
        return centred(torch.ones(n, 1, *2 * [side // 2 - 2 * cfg.overlap]), side) > 0
    cell = -(-side // cfg.cells)
    noise = F.interpolate(torch.rand(n, 1, *2 * [cfg.cells + 1]), 2 * [side + cell], mode="bicubic")
    i, j = torch.randint(cell + 1, (2,))
    noise = noise[..., i:i + side, j:j + side]                   # [n,1,H,W]
    return noise <= noise.flatten(1).kthvalue(side ** 2 // 4).values.view(n, 1, 1, 1)


def channel_wise(m, n):                                          # [B,m,n,n] -> [B,m,n,n]
    """Fully connected, each channel for itself: m n^4 weights, at first the identity."""
    full = nn.Conv2d(m, m * n * n, n, groups=m, bias=False)      # [B,m,n,n] -> [B,mnn,1,1]
    full.weight = nn.Parameter(torch.eye(n * n).repeat(m, 1).view_as(full.weight))
    return nn.Sequential(full, nn.PixelShuffle(n))


def up_convolutions(c, n, size):                                 # [B,C,n,n] -> [B,3,P,P]
    layers = [nn.Conv2d(c, c, 1), nn.ReLU()]
    while (n := 2 * n) < size:
        layers += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(c // 2), nn.ReLU()]
        c //= 2
    if n != size:
        raise ValueError(f"image_size or encoder does not fit: its map, doubled, has side {n}, not {size}")
    return nn.Sequential(*layers, nn.ConvTranspose2d(c, 3, 4, 2, 1), nn.Tanh())


def down_convolutions(size, c=64):                               # [B,3,P,P] -> logits [B,1,1,1]
    layers = [nn.Conv2d(3, c, 4, 2, 1), nn.LeakyReLU(.2)]
    while (size := size // 2) > 4:
        layers += [nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * c), nn.LeakyReLU(.2)]
        c *= 2
    return nn.Sequential(*layers, nn.Conv2d(c, 1, size))


class ContextEncoder(nn.Module):
    """encoder: has .layers(images [B,3,H,W]), a list of maps [B,C,h,w]; side is H and W.
    mean: set it to the mean colour. With adversarial > 0, .discriminator learns from .d_loss alone: step it
    with an optimizer of its own."""

    def __init__(self, encoder, side=32, region="centre", adversarial=.001):
        super().__init__()
        self.encoder, self.adversarial = encoder, adversarial
        self.size, self.seen_weight = {"centre": (side // 2, 10.), "random": (side, 0.)}[region]
        with torch.no_grad():
            x = next(encoder.parameters(), torch.empty(0)).new_zeros(1, 3, side, side)
            m, n = encoder.eval().layers(x)[-1].shape[1:3]
        encoder.train()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))    # mean colour of the data
        up, self.discriminator = up_convolutions(m, n, self.size), nn.Sequential()
        if adversarial:
            self.discriminator = down_convolutions(self.size)
        for p in (p for p in [*up.parameters(), *self.discriminator.parameters()] if p.ndim == 4):
            nn.init.normal_(p, 0, .02)
        self.decoder = nn.Sequential(channel_wise(m, n), up)

    def paint(self, v, mask):                                    # [B,3,H,W], bool [B,1,H,W] -> y [B,3,P,P]
        a = self.encoder.layers(torch.where(mask, self.mean, v))[-1]     # [B,m,n,n]
        self.h = a.mean((2, 3))                                  # [B,m]
        return self.decoder(a)

    def target(self, v):                                         # [B,3,H,W] -> t [B,3,P,P], in -1..1
        return 2 * centred(denormalise(v), self.size) - 1

    def reconstruction(self, y, v, mask):                        # [B,3,P,P], [B,3,H,W], [B,1,H,W] -> loss
        """The mean over what is hidden; of the centre block, its seen border too, with weight 10."""
        weight = torch.where(centred(mask, self.size), 1., self.seen_weight)             # [B,1,P,P]
        return (weight * (self.target(v) - y).square()).sum() / (3 * (weight > 0).sum())         # Eq. 1

    def forward(self, v, mask):                                  # [B,3,H,W], bool [B,1,H,W] -> loss
        y, self.parts = self.paint(v, mask), {}                  # [B,3,P,P]
        l2 = self.reconstruction(y, v, mask)
        if not self.adversarial:
            return l2
        d, t = self.discriminator, self.target(v)                # [B,3,P,P]
        frozen = {name: p.detach() for name, p in d.named_parameters()}  # they learn from d_loss alone
        fooled = F.softplus(-functional_call(d, frozen, y)).mean()       # -log D(y)
        self.d_loss = (F.softplus(-d(t)).mean() + F.softplus(d(y.detach())).mean()) / 2  # Eq. 2, times -1/2
        self.parts = dict(l2=l2.detach(), d_loss=self.d_loss.detach())
        return (1 - self.adversarial) * l2 + self.adversarial * fooled   # Eq. 3


def build(cfg):
    if cfg.region not in ("centre", "random"):
        common.fail(f"--region {cfg.region} is unknown: give centre or random")
    if 4 * cfg.overlap >= cfg.image_size:
        common.fail(f"--overlap {cfg.overlap} leaves nothing to hide: give less than {cfg.image_size / 4}")
    vit = dict(pool="mean") if cfg.encoder.startswith("vit") else {}     # of the patches, which learn
    try:
        return ContextEncoder(make_encoder(cfg, **vit), cfg.image_size, cfg.region, cfg.adversarial)
    except ValueError as error:
        common.fail(str(error))


def border_fill(v, mask):                                        # [B,3,H,W], [B,1,H,W] -> [B,3,H,W]
    """Every hidden pixel becomes the mean of its four neighbours: the smoothest continuation of the border.
    By successive over-relaxation, the black squares of a chessboard in turn with the white ones."""
    axis, v = torch.arange(v.shape[-1], device=v.device), v.masked_fill(mask, 0)
    omega, black = 2 / (1 + math.sin(math.pi / len(axis))), (axis[:, None] + axis) % 2 == 0
    for _ in range(6 * len(axis)):
        p = F.pad(v, (1, 1, 1, 1), mode="replicate")
        mean = (p[..., 2:, 1:-1] + p[..., :-2, 1:-1] + p[..., 1:-1, 2:] + p[..., 1:-1, :-2]) / 4
        v, black = torch.where(mask & black, v + omega * (mean - v), v), ~black
    return v


@torch.no_grad()
def fills(method, v, mask):                                      # [B,3,H,W], [B,1,H,W] -> [B,3,H,W] each
    """The image with its hole filled: painted, and in two ways without learning."""
    y = normalise((method.eval().paint(v, mask) + 1) / 2)        # [B,3,P,P]
    return {"hole": torch.where(mask, centred(y, v.shape[-1]), v), "border_fill": border_fill(v, mask),
            "mean_colour": torch.where(mask, method.mean, v)}


def scores(method, v, mask):                                     # colours in -1..1, as in the loss
    errors = {name: 2 * (denormalise(x) - denormalise(v)) for name, x in fills(method, v, mask).items()}
    return {f"{name}_mse": e[mask.expand_as(v)].square().mean().item() for name, e in errors.items()}


def picture(method, v, masks):                                   # [B,3,H,W], {name: [B,1,H,W]} -> rows
    rows = {}
    for name, mask in masks.items():
        filled = fills(method, v, mask)
        rows |= {f"{name}: seen": filled["mean_colour"], f"{name}: smoothest": filled["border_fill"],
                 f"{name}: painted": filled["hole"]}
    return {name: denormalise(x) for name, x in (rows | {"truth": v}).items()}


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    method.mean.copy_(normalise(data.images[:2000]).mean((0, 2, 3), keepdim=True))
    optimizer = make_optimizer(cfg, nn.ModuleList([method.encoder, method.decoder]))
    d_optimizer = make_optimizer(cfg, method.discriminator)      # of nothing, if that is empty
    test = normalise(data.test_images[:300])                     # [M,3,H,W]
    test_mask = draw_masks(cfg, len(test)).to(run.device)        # [M,1,H,W]
    mean_colour = method.reconstruction(2 * denormalise(method.mean) - 1, test, test_mask).item()
    model = run.start(method, data, {"mean colour": mean_colour}, optimizer, d_optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)
        mask = draw_masks(cfg, len(v)).to(run.device)            # [B,1,H,W]
        with run.autocast():
            loss = model(v, mask)
        optimizer.zero_grad()
        run.finite(loss).backward()
        if cfg.adversarial:                                      # before any step: DDP needs both passes
            set_lr(d_optimizer, cosine(step, run.total, cfg.lr / 10, warmup=cfg.warmup))
            d_optimizer.zero_grad()
            method.d_loss.backward()
            d_optimizer.step()
        optimizer.step()
        run.log(loss, h=method.h, **method.parts)

    centre = draw_masks(replace(cfg, region="centre"), 10).to(run.device)
    rows = picture(method, test[:10], {cfg.region: test_mask[:10], "centre": centre})
    common.save_grid(run.folder / "painted.png", rows, f"weight of the adversarial loss: {cfg.adversarial}")
    return run.finish(layers=True, **scores(method, test, test_mask))


if __name__ == "__main__":
    main(parse(Config, PAPER))
