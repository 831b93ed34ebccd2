"""Exemplar-CNN (2014): each patch is a class of its own.

Cut a seed patch out of an image, distort it at random, and tell which of N seeds a distorted patch is from.

Dosovitskiy, Fischer, Springenberg, Riedmiller, Brox. Discriminative Unsupervised Feature Learning with
Exemplar Convolutional Neural Networks. NIPS 2014, PAMI 2016, arXiv 1406.6909. As metric learning: Doersch,
Zisserman. Multi-task Self-Supervised Visual Learning. ICCV 2017, arXiv 1708.07860.

    x [B,3,H,W] --a seed where the gradient is strong, distorted twice--> v [2B,3,P,P] --> encoder (kept)
                                                                                                |
    which seed, of N? <--loss-- logits [2B,N] <--linear, D x N weights: more with more seeds-- h [2B,D]
    nearer to the same seed's than to others' <--loss triplet-- z [2B,Z] <--linear, D x Z------'

Good at: features that tell patches apart whatever the distortions do to them. Not at: large data: the
classifier grows with it, and of patches that look alike each must be told from the rest. The triplet form
stays small, but compares only what meets in a batch.

Run      python methods/exemplar_cnn.py
         linear 60.3 ± 0.3 % (untrained 27.2; each seed at least +32), k-NN 58.1 ± 0.2 (21.9); of distorted
         test patches 73 ± 3 % are nearest to their own of 64 seeds (untrained 14); 36 s on 2 cores
         --loss triplet: linear 51.4 ± 0.5, k-NN 41.6 ± 1.0, own seed 42 ± 4
Differs  the encoder is a ResNet, with a BatchNorm before the classifier; distortions are drawn anew at each
         step (Eq. 3), not 100 a seed once, and factors and powers evenly in their logarithm; an image has one
         seed, of one scale; the quick run's is 24 of the image's 32 pixels; Nesterov's momentum, a cosine;
         triplets are all those of the batch (the hardest alone stay at M). Quarters of a layer have their
         mean, not their maximum, and logistic regression, not an SVM.
"""
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.augment import shift_hue
from kernels.views import normalise, unit


@dataclass
class Config(common.Config):
    steps: int = 1400              # optimisation steps
    batch_size: int = 64           # seeds a step; each is seen in two distortions
    lr: float = 5e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    loss: str = "classes"          # classes: softmax over all seeds; triplet: distances in the batch
    classes: int = 2000            # N: the first N images lend a seed each
    patch: int = 24                # side of a seed in pixels
    color: float = 1.              # strength of the colour distortions; 0 leaves colours as they are
    dropout: float = 0.            # of the features, before the classifier
    dim: int = 128                 # Z, width of the triplet's embedding
    margin: float = .5             # M of the triplet


# Appendix B, and the training script that came with it: 16,000 seeds, 1.2 million steps.
PAPER = dict(data="folder:stl10", image_size=96, encoder="resnet18", steps=1_200_000, batch_size=128,
             optimizer="sgd", lr=.01, weight_decay=4e-3, warmup=0., classes=16_000, patch=32, dropout=.5)

DISTORTIONS = dict(                # from, to, how many. What cannot be negative is a factor or a power
    shift=(-.2, .2, 2),            # right and down, in sides of the patch
    scale=(.7, 1.4, 1),            # above 1 the patch shows more of the image
    angle=(-20, 20, 1),            # degrees
    contrast=(.5, 2, 3),           # of the distance to the mean colour, along each principal axis
    power=(.25, 4, 2),             # of saturation and of value
    factor=(.7, 1.4, 2),           # of both, after the power
    offset=(-.1, .1, 2),           # to both, after the factor
    hue=(-.1, .1, 1))              # turns of the colour circle


def draw(n, place=1., color=1., device="cpu"):                   # -> {name: [n,how many]}
    """place: strength of the first three, color: of the others. At 0 they change nothing."""
    drawn = {}
    for name, (low, high, k) in DISTORTIONS.items():
        factor, strength = low > 0, place if name in ("shift", "scale", "angle") else color
        low, high = (math.log(low), math.log(high)) if factor else (low, high)
        t = strength * (low + (high - low) * torch.rand(n, k, device=device))
        drawn[name] = t.exp() if factor else t
    return drawn


def seeds(x, p):                                                 # uint8 [N,3,H,W] -> centres (x, y) [N,2]
    """A p x p patch of each image, with a probability in proportion to its mean squared gradient."""
    gradient = torch.stack(torch.gradient(unit(x), dim=(2, 3))).square().sum((0, 2))     # [N,H,W]
    weight = F.avg_pool2d(gradient[:, None], p, 1)               # [N,1,H-p+1,W-p+1], by top left corner
    corner = weight.flatten(1).clamp_min(1e-12).cpu().multinomial(1).to(x.device)        # [N,1]
    return torch.cat([corner % weight.shape[3], corner // weight.shape[3]], 1) + p / 2


def principal_colours(x):                                        # uint8 [N,3,H,W] -> mean [3,1,1], axes [3,3]
    pixels = unit(x).transpose(0, 1).flatten(1)                  # [3,NHW]
    axes = torch.linalg.eigh(pixels.cov().cpu()).eigenvectors    # columns
    return pixels.mean(1)[:, None, None], axes.to(x.device)


def cut(x, centre, p, t):                                        # uint8 [B,3,H,W], [B,2] -> [B,3,p,p] in 0..1
    """Out of the whole image, mirrored at its borders: what comes into the patch is never made up."""
    side, a = torch.tensor(x.shape[:1:-1], device=x.device), t["angle"].deg2rad()        # [2] = W, H; [B,1]
    turn = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], 1).view(-1, 2, 2)
    zoom = p * t["scale"] / side                                 # [B,2]
    middle = 2 * (centre + p * t["shift"]) / side - 1            # [B,2]  the image's borders are -1 and 1
    grid = F.affine_grid(torch.cat([turn * zoom[..., None], middle[..., None]], 2), (len(x), 3, p, p),
                         align_corners=False)                    # [B,p,p,2]
    return F.grid_sample(unit(x), grid, padding_mode="reflection", align_corners=False)


def distort(x, centre, p, t, mean, axes):                        # as cut, with its colours distorted too
    x = cut(x, centre, p, t) - mean                              # [B,3,p,p]
    x = mean + torch.einsum("ij,bj,kj,bkhw->bihw", axes, t["contrast"], axes, x)         # contrast 1
    x = x.clamp(0, 1)
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)                        # [B,1,p,p]
    saturation = (value - low) / value.clamp_min(1e-8)           # [B,1,p,p]
    part = (value - x) / (value - low).clamp_min(1e-8)           # [B,3,p,p]  x = value (1 - saturation part)
    power, factor, offset = (t[name][..., None, None] for name in ("power", "factor", "offset"))
    x = torch.cat([saturation, value], 1) ** power * factor + offset                     # contrast 2
    saturation, value = x.clamp(0, 1).split(1, 1)
    return shift_hue(value * (1 - saturation * part), t["hue"])


def triplets(z, k, margin):                                      # [2B,Z], [2B] -> loss, right [2B]
    """A patch, the other one of its seed, and each patch of another seed. right: none of those is nearer."""
    z = F.normalize(z.float(), dim=1)
    with torch.autocast(z.device.type, enabled=False):
        d = 1 - z @ z.T                                          # [2B,2B]  D, cosine distances
    positive = torch.cat([d.diagonal(len(z) // 2), d.diagonal(-len(z) // 2)])[:, None]   # [2B,1]
    other = k[:, None] != k                                      # [2B,2B]
    loss = (positive - d + margin).clamp_min(0)[other].mean()    # max(0, D(a,p) - D(a,n) + M)
    return loss, (positive < d.where(other, torch.inf)).all(1)


class ExemplarCNN(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim], of patches and of whole images alike."""

    def __init__(self, encoder, loss="classes", classes=8000, dim=128, margin=.5, dropout=.5,
                 gather=lambda z: z):
        super().__init__()
        self.encoder, self.loss, self.margin, self.gather = encoder, loss, margin, gather
        # Without the norm the loss stays at ln N until each class has been seen many times.
        self.head = nn.Sequential(nn.BatchNorm1d(encoder.dim, affine=False), nn.Dropout(dropout),
                                  nn.Linear(encoder.dim, dict(classes=classes, triplet=dim)[loss]))

    def forward(self, v, k):                                     # [2B,3,P,P], seed of each [2B] -> loss
        self.h = self.encoder(v)                                 # [2B,D]
        z = self.head(self.h)                                    # [2B,N] or [2B,Z]
        if self.loss == "classes":
            self.accuracy = (z.argmax(1) == k).float().mean()
            return F.cross_entropy(z, k)                         # Eq. 1 and 2
        z, k = (torch.cat([self.gather(half) for half in y.chunk(2)]) for y in (z, k))   # of all processes
        loss, right = triplets(z, k, self.margin)
        self.accuracy = right.float().mean()
        return loss


def build(cfg):
    if cfg.loss not in ("classes", "triplet"):
        common.fail(f"--loss {cfg.loss} is unknown: give classes or triplet")
    if cfg.patch > cfg.image_size:
        common.fail(f"--patch {cfg.patch} is larger than the image: give at most {cfg.image_size}")
    encoder = make_encoder(replace(cfg, image_size=cfg.patch))   # the stem for patches, not for images
    return ExemplarCNN(encoder, cfg.loss, cfg.classes, cfg.dim, cfg.margin, cfg.dropout, common.gather)


def head_parameters(cfg, loss, n):                               # what n seeds ask for behind the encoder
    return sum(p.numel() for p in build(replace(cfg, loss=loss, classes=n)).head.parameters())


def found(encoder, rows):                                        # [n,1+K,3,P,P], a seed first, then distorted
    """Percent of the distorted patches whose nearest seed of the n, by cosine, is their own."""
    h = F.normalize(common.features(encoder, rows.flatten(0, 1)), dim=1).unflatten(0, rows.shape[:2])
    nearest = (h[:, 1:] @ h[:, 0].T).argmax(2)                   # [n,K]
    return common.percent(nearest, torch.arange(len(h), device=h.device)[:, None])


def invariance(path, encoders, seen, colours):
    """How far a distortion moves the features, in mean distances between two seeds (the paper's Fig. 6)."""
    from matplotlib.figure import Figure
    figure, still = Figure((9, 2.4), layout="tight"), draw(len(seen[0]), 0, 0, seen[0].device)
    for axis, name in zip(figure.subplots(1, 3, sharey=True), ("angle", "shift", "hue"), strict=True):
        low, high, _ = DISTORTIONS[name]
        values = torch.linspace(4 * low, 4 * high, 9).tolist()   # the fifth is 0
        for label, encoder in encoders.items():
            patches = [distort(*seen, still | {name: still[name] + value}, *colours) for value in values]
            h = [F.normalize(common.features(encoder, v), dim=1) for v in patches]       # [n,D] each
            apart = (h[4] - h[4].roll(1, 0)).norm(dim=1).mean()
            axis.plot(values, [((h_i - h[4]).norm(dim=1).mean() / apart).item() for h_i in h], label=label)
        axis.axvspan(low, high, color="grey", alpha=.2)          # seen in training
        axis.set_title(name, fontsize=9)
    axis.legend(fontsize=7)
    common.write(path, lambda f: figure.savefig(f, dpi=110, bbox_inches="tight"))


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    n = min(cfg.classes, len(data.images))
    method = build(replace(cfg, classes=n)).to(run.device)
    optimizer = make_optimizer(cfg, method)
    reference = {f"ln {n}": math.log(n)} if cfg.loss == "classes" else {"margin": cfg.margin}
    model = run.start(method, data, reference, optimizer)
    centres = torch.cat([seeds(x, cfg.patch) for x in data.images[:n].split(1000)])      # [N,2]
    colours = principal_colours(data.images[:1000])

    for step, index in run.steps(len(data.images)):
        index = index % n                                        # [B] the seeds, also the first n images
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = torch.cat([distort(x, centres[index], cfg.patch, draw(len(x), 1., cfg.color, x.device), *colours)
                       for _ in range(2)])                       # [2B,3,P,P]
        with run.autocast():
            loss = model(normalise(v), index.repeat(2))
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, accuracy=method.accuracy)

    x = data.test_images[:64]
    seen = x, seeds(x, cfg.patch), cfg.patch
    drawn = [draw(len(x), s, s * cfg.color, x.device) for s in (0, *[1] * 12)]
    rows = torch.stack([distort(*seen, t, *colours) for t in drawn], 1)                  # [64,13,3,P,P]
    shown = {f"patch {i}, distorted": row for i, row in enumerate(rows[:6])}
    common.save_grid(run.folder / "distortions.png", shown)
    encoders = {"untrained": run.untrained, "trained": method.encoder}
    invariance(run.folder / "invariance.png", encoders, seen, colours)
    sizes = {f"{loss}, {n:,} seeds": head_parameters(cfg, loss, n)
             for loss in ("classes", "triplet") for n in (1000, 8000, 32_000)}
    run.print("parameters of the head: " + "; ".join(f"{k}: {v:,}" for k, v in sizes.items()))
    own = {f"own seed found, {name}": found(encoder, rows) for name, encoder in encoders.items()}
    return run.finish(layers=True, head_parameters=sizes, **own)


if __name__ == "__main__":
    main(parse(Config, PAPER))
