"""Colorization (2016): tell the colours of a grey picture.

From the lightness alone, a distribution over 313 colours at each place; rare, vivid ones weigh more in the
loss, or all would turn brown. Whoever colours a toy right has recognised it.

Zhang, Isola, Efros. Colorful Image Colorization. ECCV 2016, arXiv 1603.08511.

    v [B,3,H,W] --L of Lab--> encoder (kept) --> [B,D,h,w] --transposed convolution--> logits [B,313,H/4,W/4]
        |                                                                                |  '--T = .38--> a, b
        '--a, b of one pixel in 4 x 4--> shares of the 5 nearest of 313 bins <---loss----'
                                         z [B,N,313], N = H/4 W/4; rare ones weigh more

Good at: things that mostly have one colour; any colour pictures will do to train on. Not at: things of any
colour, or telling apart what only colour does: the encoder never sees it, the pixels in the table do.
A middle layer may be the best, so each is probed.

Run      python methods/colorization.py
         linear 38.2 ± 1.1 % (untrained 23.1; each seed at least +13), k-NN 27.1 ± 0.8 (23.9), layer 2 in
         2 x 2 cells linear 48.8 (34.1); 42 s on 2 cores. Chroma at T = 1, .38, 0: 17, 19, 31; truth 30
         --loss l2: linear 38.9 ± 2.7, k-NN 33.4 ± 1.3; chroma 10: washed out, but no worse features
Differs  a ResNet that sees L three times over, not a dilated VGG; the head has one 3x3 convolution, not two;
         the prior is that of places in 4,000 images; the loss is a mean, not a sum; views are resized crops,
         AdamW, the rate follows a cosine, weights do not start from k-means. As in the official code, grey
         pictures do not count; 5 bins and T .38 are the text's, that code has 10 and .384.
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
from kernels.colour import ab_bins, lab_to_rgb, rgb_to_lab
from kernels.views import denormalise, normalise, unit, views


@dataclass
class Config(common.Config):
    steps: int = 1000              # optimisation steps
    lr: float = 2e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    batch_size: int = 64           # images a step, all processes together
    loss: str = "classes"          # classes (313 bins), or l2: regression, whose colours are washed out
    lam: float = .5                # share of the uniform distribution in the prior; 1 is no rebalancing
    tau: float = .38               # temperature T of the annealed mean
    width: int = 64                # channels of the head
    crop: float = .5               # smallest share of the image's area in a view


# The text; its rate falls to 1e-5 and 3e-6. The image's side and B: official code.
PAPER = dict(data="folder:imagenet", image_size=176, encoder="resnet18", steps=450_000, batch_size=40,
             lr=3e-5, beta2=.99, weight_decay=1e-3, warmup=0., width=256)


def grey_and_ab(v):                                              # [B,3,H,W] -> [B,3,H,W], [B,2,H,W]
    """The lightness, three times over: all that the encoder sees. And the colours."""
    with torch.autocast(v.device.type, enabled=False):           # rounding would carry colour into L
        lab = rgb_to_lab(denormalise(v))                         # [B,3,H,W]
    return normalise((lab[:, :1] / 100).expand(-1, 3, -1, -1)), lab[:, 1:]


class Grey(nn.Module):
    """An encoder that is shown no colour, neither in training nor in tests."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dim = encoder, encoder.dim

    def layers(self, v):                                         # [B,3,H,W] -> a map a layer, [B,C_l,h_l,w_l]
        return self.encoder.layers(grey_and_ab(v)[0])

    def forward(self, v):                                        # [B,3,H,W] -> [B,D]
        return self.encoder(grey_and_ab(v)[0])


def soft_code(ab, bins, k=5, sigma=5.):                          # [...,2], [Q,2] -> z [...,Q], sums to 1
    """The shares of a colour's k nearest bins, by a Gaussian of the distance."""
    d, i = torch.cdist(ab, bins).topk(k, largest=False)          # [...,k]
    share = (-d ** 2 / (2 * sigma ** 2)).softmax(-1)             # [...,k]
    return share.new_zeros(*ab.shape[:-1], len(bins)).scatter(-1, i, share)


def class_weights(z, bins, lam=.5, sigma=5.):                    # [M,Q], [Q,2] -> w [Q]
    """The rarer a colour, the more it weighs; 1 in the mean over the prior p, the smoothed shares of bins."""
    smooth = (-torch.cdist(bins, bins) ** 2 / (2 * sigma ** 2)).softmax(1)       # [Q,Q]
    p = smooth @ z.argmax(1).bincount(minlength=len(bins)).float()       # [Q]
    p = p / p.sum()
    w = 1 / ((1 - lam) * p + lam / len(p))                       # [Q]  Eq. 4
    return w / (p * w).sum()


def annealed_mean(logits, bins, tau):                            # [B,Q,h,w], [Q,2] -> [B,2,h,w]
    """From the mean of the distribution, tau = 1, to its mode, tau -> 0."""
    return torch.einsum("bqhw,qc->bchw", (logits / tau).softmax(1), bins)        # Eq. 5


class Colorization(nn.Module):
    """encoder: has .dim and .layers(images [B,3,H,W]), whose last map is [B,dim,h,w]. weights: set
    them, see class_weights; at first all colours count alike."""

    def __init__(self, encoder, loss="classes", width=64):
        super().__init__()
        self.encoder, self.loss = Grey(encoder), loss
        with torch.no_grad():
            x = next(encoder.parameters(), torch.empty(0)).new_zeros(1, 3, 64, 64)
            side = encoder.eval().layers(x)[-1].shape[3]
        stride = getattr(encoder.train(), "patch", 64 // side)
        self.steps = max(0, math.ceil(math.log2(stride / 4)))    # up to a quarter of the image
        self.cell = stride / 2 ** self.steps
        self.register_buffer("bins", ab_bins())                  # [Q,2]
        self.register_buffer("weights", torch.ones(len(self.bins)))      # [Q]
        head, c = [], encoder.dim
        for _ in range(self.steps):
            head, c = [*head, nn.ConvTranspose2d(c, width, 4, 2, 1), nn.ReLU()], width
        self.head = nn.Sequential(*head, nn.Conv2d(c, width, 3, 1, 1), nn.ReLU(),
                                  nn.Conv2d(width, dict(l2=2, classes=len(self.bins))[loss], 1))

    def predict(self, v):                                        # [B,3,H,W] -> [B,Q,h,w]; l2: [B,2,h,w]
        last = self.encoder.layers(v)[-1]                        # [B,D,h',w']
        self.h = last.mean((2, 3))                               # [B,D]
        h, w = (int(n / self.cell) for n in v.shape[2:])         # a map of 44 x 44 comes as 6 x 6 eights
        return self.head(last)[:, :, :h, :w].float()

    def compare(self, out, ab):                                  # [B,Q,h,w], [B,2,H,W] -> loss
        ab = F.interpolate(ab, out.shape[2:], mode="nearest-exact")      # [B,2,h,w]  one pixel of each cell
        out, ab = out.flatten(2), ab.flatten(2).mT               # [B,Q,N], [B,N,2]
        if self.loss == "l2":
            return (100 * out.mT - ab).square().sum(2).mean() / 2         # Eq. 1
        z = soft_code(ab, self.bins)                             # [B,N,Q]  Z
        colourful = (ab.abs() > 5).flatten(1).any(1)             # [B]    a grey picture has none to tell
        w = self.weights[z.argmax(2)] * colourful[:, None]       # [B,N]  Eq. 3
        return (w * F.cross_entropy(out, z.mT, reduction="none")).mean()       # Eq. 2

    def forward(self, v):                                        # [B,3,H,W] -> loss
        return self.compare(self.predict(v), grey_and_ab(v)[1])

    def colours(self, v, tau=.38):                               # [B,3,H,W] -> a and b [B,2,H,W]
        out = self.predict(v)
        ab = 100 * out if self.loss == "l2" else annealed_mean(out, self.bins, tau)
        return F.interpolate(ab, v.shape[2:], mode="bilinear")


def build(cfg):
    if cfg.loss not in ("classes", "l2"):
        common.fail(f"--loss {cfg.loss} is unknown: give classes or l2")
    vit = dict(pool="mean") if cfg.encoder.startswith("vit") else {}     # of the patches, which learn
    return Colorization(make_encoder(cfg, **vit), cfg.loss, cfg.width)


def colours_of(images, n=100_000):                               # uint8 [N,3,H,W] -> [n,2]
    """The colours of n places in 4,000 images."""
    x = images[torch.randperm(len(images))[:4000].to(images.device)]
    ab = torch.cat([grey_and_ab(normalise(x_i))[1][..., ::4, ::4] for x_i in x.split(100)])
    ab = ab.movedim(1, 3).flatten(0, 2)
    return ab[torch.randperm(len(ab))[:n].to(ab.device)]


def references(z, weights):                                      # [M,Q], [Q] -> losses by name
    """What the best constant guess costs, and what the soft codes themselves do: the least there is."""
    w = weights[z.argmax(1), None]                               # [M,1]
    p = (w * z).mean(0)                                          # [Q]  the guess, before it is normalised
    return {"without looking": (p.sum() * torch.special.entr(p / p.sum()).sum()).item(),
            "perfect": (w * torch.special.entr(z)).sum(1).mean().item()}


def coloured(method, images, taus):                              # uint8 [B,3,H,W] -> rows of floats [B,3,H,W]
    """Images as the encoder sees them, coloured at each temperature, and in truth."""
    v, light = normalise(images), rgb_to_lab(unit(images))[:, :1]
    rows = {name: torch.cat([light, method.colours(v, tau)], 1) for name, tau in taus.items()}
    return {"grey": denormalise(grey_and_ab(v)[0]), **{name: lab_to_rgb(lab) for name, lab in rows.items()},
            "truth": unit(images)}


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    ab = colours_of(data.images)                                 # [M,2]
    z = soft_code(ab, method.bins)                               # [M,Q]
    method.weights.copy_(class_weights(z, method.bins, cfg.lam))
    taus = {"mean, T = 1": 1., f"T = {cfg.tau}": cfg.tau, "mode": 1e-3}
    reference = {"ln 313": math.log(313)} | references(z, method.weights)
    if cfg.loss == "l2":
        taus, reference = {"l2": 1.}, {"mean colour": ab.var(0).sum().item() / 2}
    model = run.start(method, data, reference, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h)

    x = data.test_images[:500]
    with torch.no_grad():
        rows, test_loss = coloured(method.eval(), x, taus), method(normalise(x)).item()
    common.save_grid(run.folder / "colours.png", {name: row[:10] for name, row in rows.items()})
    chroma = {f"chroma, {name}": rgb_to_lab(row)[:, 1:].norm(dim=1).mean().item()
              for name, row in rows.items() if name != "grey"}
    return run.finish(layers=True, test_loss=test_loss, **chroma)


if __name__ == "__main__":
    main(parse(Config, PAPER))
