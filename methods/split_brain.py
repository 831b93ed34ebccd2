"""Split-Brain (2017): from lightness tell colour, and back.

Two networks that share nothing: one sees the lightness L and tells the colour ab at each place, the other
sees ab and tells L. Side by side their features know the whole image, though neither could copy its answer.

Zhang, Isola, Efros. Split-Brain Autoencoders: Unsupervised Learning by Cross-Channel Prediction.
CVPR 2017, arXiv 1611.09842.

    v [B,3,H,W] --Lab--> L,0,0 --> F1 (kept) --> [B,D1,h,w] --head--> logits [B,313,g,g] <--loss-- bin of ab
                    |       features: F1 and F2 side by side [B,D1+D2]                             [B,g,g]
                    '--> 0,a,b --> F2 (kept) --> [B,D2,h,w] --head--> logits [B,100,g,g] <--loss-- bin of L

Good at: what both lightness and colour tell: no channel is withheld in use, as colorization withholds colour.
Other pairs of channels do as well, such as RGB and depth. Not at: data where one says little of the other;
here most cells are ground, of any colour, and the loss stays near what needs no look.

Run      python methods/split_brain.py
         linear 47.5 ± 1.4 % (untrained 37.8; each seed at least +7), layer 2 in 2 x 2 cells 60.1 (52.7), but
         k-NN 23.5 ± 0.4 (24.2); 50 s on 2 cores. Layer 2 of --variant l_to_ab, ab_to_l, autoencoder: 56.9,
         55.7, 52.3; their last one: linear 44.2, 42.5, 46.1, k-NN 30.9, 27.4, 26.2
Differs  halves are whole ResNets, not an AlexNet cut along its channels; every variant has two, so that all
         have one size: a single direction is learned twice, from two starts; heads are a 3x3 and a 1x1
         convolution; what is told is a cell's mean, as the one nearest bin, and all bins weigh alike; the
         autoencoder sees and regresses all of Lab; views are resized crops; AdamW, the rate follows a
         cosine. One network for both directions and the ensemble, which the paper tries too, are left out.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.colour import ab_bins, lab_to_rgb, rgb_to_lab
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    steps: int = 900               # optimisation steps
    lr: float = 2e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    batch_size: int = 64           # images a step, all processes together
    variant: str = "split"         # split; or both halves alike: l_to_ab, ab_to_l, autoencoder
    cell: int = 4                  # about the side in pixels of the cells whose colours are told
    crop: float = .5               # smallest share of the image's area in a view


# The official code has no solver: optimizer and batch are Colorization's, its VGG's. Cells: 12 x 12.
PAPER = dict(data="folder:imagenet", image_size=180, encoder="resnet18", steps=450_000, batch_size=40,
             lr=3e-5, beta2=.99, weight_decay=1e-3, warmup=0., cell=15)

SEES = dict(split=("L", "ab"), l_to_ab=("L", "L"), ab_to_l=("ab", "ab"), autoencoder=("Lab", "Lab"))
TOLD = {"L": 313, "ab": 100, "Lab": 3}                           # outputs of a half that sees L, ab, all
MIDDLE = torch.tensor([50., 0, 0]).view(3, 1, 1)                 # what a half sees where it is blind


def scaled(lab):                                                 # L to -.5..+.5, a and b to about -1..1
    return (lab - MIDDLE.to(lab.device)) / 100


def to_lab(v):                                                   # normalised RGB -> Lab, [B,3,H,W]
    with torch.autocast(v.device.type, enabled=False):           # rounding would carry L into a and b
        return rgb_to_lab(denormalise(v.float()))


def target(lab, sees, bins):                                     # [B,3,g,g], [Q,2] -> [B,g,g], or [B,3,g,g]
    """What is told from the channels seen: the nearest bin of ab, the unit of L, or all three as they are."""
    if sees == "L":
        ab = rearrange(lab[:, 1:], "b c h w -> (b h w) c")       # [M,2]
        return torch.cdist(ab, bins).argmin(1).view_as(lab[:, 0])
    return lab[:, 0].floor().long().clamp(0, 99) if sees == "ab" else scaled(lab)


def told_loss(out, y):                                           # [B,K,g,g], [B,g,g] or [B,K,g,g] -> loss
    return (out - y).square().sum(1).mean() / 2 if y.is_floating_point() else F.cross_entropy(out, y)


class Halves(nn.Module):
    """Two encoders side by side. Each is shown its part of an image's Lab, and 0 where it is blind."""

    def __init__(self, encoders, sees=("L", "ab")):
        super().__init__()
        self.encoders, self.dim = nn.ModuleList(encoders), sum(encoder.dim for encoder in encoders)
        shown = torch.tensor([[float(c in part) for c in "Lab"] for part in sees])
        self.register_buffer("shown", shown)                     # [2,3]

    def parts(self, lab):                                        # [B,3,H,W] -> what each sees, [2,B,3,H,W]
        return self.shown[:, None, :, None, None] * scaled(lab)

    def layers(self, v):                                         # [B,3,H,W] -> a map a layer, [B,C_l,h_l,w_l]
        pairs = zip(self.encoders, self.parts(to_lab(v)), strict=True)
        return [torch.cat(maps, 1) for maps in zip(*(f.layers(part) for f, part in pairs), strict=True)]

    def forward(self, v):                                        # [B,3,H,W] -> [B,D1+D2]
        pairs = zip(self.encoders, self.parts(to_lab(v)), strict=True)
        return torch.cat([f(part) for f, part in pairs], 1)


class SplitBrain(nn.Module):
    """encoders: two, with .dim and .layers(images [B,3,H,W]), whose last map is [B,dim,h,w]."""

    def __init__(self, encoders, sees=("L", "ab"), cell=4):
        super().__init__()
        self.encoder, self.sees, self.heads = Halves(encoders, sees), sees, nn.ModuleList()
        self.register_buffer("bins", ab_bins())                  # [313,2]
        for encoder, part in zip(encoders, sees, strict=True):
            with torch.no_grad():
                x = next(encoder.parameters(), torch.empty(0)).new_zeros(1, 3, 64, 64)
                side = encoder.eval().layers(x)[-1].shape[3]
            stride, d = getattr(encoder.train(), "patch", 64 // side), encoder.dim
            up = max(1, stride // cell)                          # up * up cells a place of the map
            self.heads.append(nn.Sequential(nn.Conv2d(d, d // 2, 3, 1, 1), nn.ReLU(),
                                            nn.Conv2d(d // 2, TOLD[part] * up ** 2, 1), nn.PixelShuffle(up)))

    def predict(self, lab):                                      # [B,3,H,W] -> of each half, [B,K,g,g]
        pairs = zip(self.encoder.encoders, self.encoder.parts(lab), strict=True)
        last = [f.layers(part)[-1] for f, part in pairs]         # [B,D1,h,w], [B,D2,h,w]
        self.h = torch.cat([a.mean((2, 3)) for a in last], 1)    # [B,D1+D2]
        return [head(a).float() for head, a in zip(self.heads, last, strict=True)]

    def forward(self, v):                                        # [B,3,H,W] -> loss
        lab = to_lab(v)                                          # [B,3,H,W]
        outs = self.predict(lab)
        cells = F.adaptive_avg_pool2d(lab, outs[0].shape[2:])    # [B,3,g,g]
        loss = [told_loss(out, target(cells, part, self.bins))
                for out, part in zip(outs, self.sees, strict=True)]
        self.losses = [half.detach() for half in loss]
        return sum(loss)                                         # equal weights


def build(cfg):
    if cfg.variant not in SEES:
        common.fail(f"--variant {cfg.variant} is unknown: give {', '.join(SEES)}")
    vit = dict(pool="mean") if cfg.encoder.startswith("vit") else {}     # of the patches, which learn
    return SplitBrain([make_encoder(cfg, **vit), make_encoder(cfg, **vit)], SEES[cfg.variant], cfg.cell)


def references(method, lab, grid):                               # [N,3,H,W] -> what to read the loss against
    """The loss where all bins are alike, and where only their shares in the data are known."""
    lab, (k1, k2) = F.adaptive_avg_pool2d(lab, grid), (TOLD[part] for part in method.sees)
    y = [target(lab, part, method.bins) for part in method.sees]
    if "Lab" in method.sees:
        return {"mean colour": sum(y_i.var((0, 2, 3), correction=0).sum().item() / 2 for y_i in y)}
    shares = [y_i.flatten().bincount() / y_i.numel() for y_i in y]       # [K] each at most
    return {f"ln {k1} + ln {k2}": math.log(k1 * k2),
            "without looking": sum(torch.special.entr(p).sum().item() for p in shares)}


def completed(lab, out, sees, bins, tau=.38):                    # [B,3,H,W], [B,K,g,g] -> Lab [B,3,H,W]
    """What a half sees, and what it tells of the rest: the annealed mean, tau as in Colorization."""
    if sees == "Lab":
        return F.interpolate(MIDDLE.to(lab.device) + 100 * out, lab.shape[2:], mode="bilinear")
    centres = bins if sees == "L" else torch.arange(.5, 100, device=bins.device)[:, None]        # [K,C]
    told = torch.einsum("bkhw,kc->bchw", (out / tau).softmax(1), centres)
    told = F.interpolate(told, lab.shape[2:], mode="bilinear")   # [B,C,H,W]
    return torch.cat([lab[:, :1], told] if sees == "L" else [told, lab[:, 1:]], 1)


@torch.no_grad()
def picture(method, images):                                     # uint8 [n,3,H,W] -> rows of images
    lab, rows = to_lab(normalise(images)), {"image": images}
    for sees, part, out in zip(method.sees, method.encoder.parts(lab), method.predict(lab), strict=True):
        rows[f"{sees} alone"] = lab_to_rgb(MIDDLE.to(lab.device) + 100 * part)
        rows[f"told from {sees}"] = lab_to_rgb(completed(lab, out, sees, method.bins))
    return rows


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    sample = data.images[torch.randperm(len(data.images))[:500].to(run.device)]
    lab = to_lab(normalise(sample))                              # [500,3,H,W]
    with torch.no_grad():
        grid = method.eval().predict(lab[:1])[0].shape[2:]       # of the cells that it tells
    known = references(method.train(), lab, grid)
    model = run.start(method, data, known, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, F1=method.losses[0], F2=method.losses[1])

    common.save_grid(run.folder / "told.png", picture(method.eval(), data.test_images[:10]))
    with torch.no_grad():
        test_loss = method(normalise(data.test_images[:500])).item()
    return run.finish(layers=True, test_loss=test_loss)


if __name__ == "__main__":
    main(parse(Config, PAPER))
