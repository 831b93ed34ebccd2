"""DINO (2021): agree with a slow copy on soft clusters.

From a small part of an image, tell to which prototypes a slowly moving copy of the network assigns the whole.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin. Emerging Properties in Self-Supervised Vision
Transformers. ICCV 2021, arXiv 2104.14294.

    x --2 global crops--> v [2B,3,S,S] --> teacher (kept) --> head --> t [2B,K] --(t - c) / tau_t--> // p_t
         |                    |                ~~> m          ~~> m         ~~> c (mean, moving)       | loss
         |                    '----------> student --------> head --> s [VB,K] -------s / tau_s-----> p_s
         '--V-2 local crops--> [..,3,s,s] --^          every crop, against every other global crop

Good at: k-NN on the features as they are; attention that falls on the object. Not at: few steps; telling the
object from all else that the crops share (--data toys: grounds with colours of their own, which it then tells
apart). --no-centering: one prototype wins, perplexity 1. --no-sharpening: all stay equal, the loss at ln K.

Run      python methods/dino.py
         linear 47.0 ± 0.8 % (untrained 35.9; each seed at least +10), k-NN 44.4 ± 1.6 (32.5); IoU of the
         attention nearest to the object .50 ± .10 (.25; of discs that never look .49); 66 s on 2 cores
Differs  no stochastic depth; the rate falls to 0; crops are resized bilinearly, positions to the crop's exact
         number of patches; the last layer's rows stay of length 1, which the official long run trains; the
         quick run has grey grounds, two local crops, a sharper teacher that moves faster, and neither blur
         nor solarise.
"""
import copy
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
from kernels.prototype_ce import prototype_ce
from kernels.views import normalise, views


@dataclass
class Config(common.Config):
    data: str = "toys:grey"        # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    encoder: str = "vit_micro/8"   # vit_micro, vit_tiny, vit_small/8 ..., or a ResNet, without attention maps
    steps: int = 800               # optimisation steps
    batch_size: int = 32           # images a step, all processes together
    lr: float = 5e-4               # peak learning rate: linear warm-up, then half a cosine to 0
    weight_decay: float = .04      # on weights and tokens at the start; changes by a cosine
    decay_end: float = .4          # the same at the end
    warmup: float = .1             # part of the run in which the learning rate rises
    hidden: int = 512              # width of the head's hidden layers
    dim: int = 64                  # width of z
    k: int = 256                   # number K of prototypes
    tau_s: float = .1              # temperature of the student
    tau_t: float = .03             # temperature of the teacher at the start
    tau_t_end: float = .03         # the same after the next share of the run, risen linearly
    rise: float = .1               # that share
    m: float = .99                 # momentum of the teacher at the start; rises to 1 by a cosine
    freeze: float = .3             # part of the run in which the prototypes stay as they are
    clip: float = 3.               # largest norm of a tensor's gradient; 0 is any
    size: int = 24                 # side of a global crop in pixels
    size_local: int = 16           # side of a local crop
    local: int = 2                 # number of local crops
    crop: float = .4               # global crops have at least this share of the area, local ones at most
    crop_local: float = .15        # smallest share of the area in a local crop
    blur: float = 0.               # probability of blur in view 2; if positive, 1 in view 1, .5 in local ones
    solarise: float = 0.           # probability of solarising view 2
    centering: bool = True         # the teacher's centre; without it one prototype wins
    sharpening: bool = True        # a teacher sharper than the student; without it all prototypes stay equal


# Official code, its command of 300 epochs: rate 5e-4 x B/256, warm-up 10 epochs, prototypes frozen for 1.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="vit_small/16", epochs=300, batch_size=1024,
             lr=2e-3, warmup=.033, hidden=2048, dim=256, k=65536, tau_t=.04, tau_t_end=.07, m=.996,
             freeze=.0033, size=224, size_local=96, local=8, crop_local=.05, blur=.1, solarise=.2)


class Head(nn.Module):
    """[B,D] -> K cosines between z and the prototypes; BatchNorm only if the encoder has it."""

    def __init__(self, width, hidden, dim, k, norm):
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        for i in (3, 1) if norm else ():
            layers.insert(i, nn.BatchNorm1d(hidden))
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, dim))
        for m in (m for m in self.layers if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(m.weight, std=.02)
            nn.init.zeros_(m.bias)
        self.prototypes = nn.Linear(dim, k, bias=False)

    def forward(self, h):                                        # [B,D] -> [B,K]
        z = F.normalize(self.layers(h), dim=1)                   # [B,P]
        return F.linear(z, F.normalize(self.prototypes.weight, dim=1))


def usage(t, c, tau):                                            # [R,K], [K] -> two numbers by name
    """How many prototypes the rows have between them, 1..K, and how far a row is from uniform, 0..ln K."""
    p = F.softmax((t.float() - c) / tau, 1)                      # [R,K]
    kl = math.log(p.shape[1]) - torch.special.entr(p).sum(1).mean()
    return dict(perplexity=torch.special.entr(p.mean(0)).sum().exp(), kl=kl)


class DINO(nn.Module):
    """encoder: images [B,3,H,W] of any size -> [B,encoder.dim]; it is the teacher's, the one that is kept.
    Call update_teacher(m) after every optimizer step. gather: [B,K] -> the rows of all processes."""

    def __init__(self, encoder, hidden=512, dim=64, k=256, tau_s=.1, centering=True, gather=lambda t: t):
        super().__init__()
        self.tau_s, self.centering, self.gather = tau_s, centering, gather
        norm = any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
        self.encoder, self.head = encoder, Head(encoder.dim, hidden, dim, k, norm)
        self.student = copy.deepcopy(nn.Sequential(self.encoder, self.head))
        self.encoder.requires_grad_(False)
        self.head.requires_grad_(False)
        self.register_buffer("center", torch.zeros(k))

    def forward(self, v1, v2, *small, tau_t=.04):                # V crops [B,3,.,.], two global -> loss
        v = torch.cat([v1, v2])                                  # [2B,3,S,S]
        with torch.no_grad():                                    # in training mode: its own batch statistics
            self.h = self.encoder(v)                             # [2B,D]
            self.t = self.head(self.h)                           # [2B,K]
            self.parts = usage(self.t, self.center, tau_t)
        encoder, head = self.student
        h = [encoder(v)] + ([encoder(torch.cat(small))] if small else [])        # [2B,D], [(V-2)B,D]
        s, t = head(torch.cat(h)).split(len(v1)), self.t.chunk(2)        # [B,K] each, of V and of 2 crops
        return torch.stack([prototype_ce(s[i], t[g], self.tau_s, tau_t, self.center).mean()
                            for g in (0, 1) for i in range(len(s)) if i != g]).mean()    # 2V-2 terms

    @torch.no_grad()
    def update_teacher(self, m):                                 # weights only, not BatchNorm's buffers
        teacher = nn.Sequential(self.encoder, self.head)
        for t, s in zip(teacher.parameters(), self.student.parameters(), strict=True):
            t.lerp_(s, 1 - m)                                    # theta_t <- m theta_t + (1-m) theta_s
        if self.centering:                                       # after its use, by raw outputs
            mean = self.gather(self.t.to(self.center.dtype).mean(0, keepdim=True)).mean(0)       # [K], of all
            self.center.lerp_(mean, .1)                          # c <- .9 c + .1 mean


def build(cfg):
    encoder = make_encoder(cfg)
    patch = getattr(encoder, "patch", 0)
    if cfg.size < 2 * patch or cfg.local and cfg.size_local < patch:
        common.fail(f"--size {cfg.size}, --size_local {cfg.size_local}: few pixels for patches of {patch}")
    return DINO(encoder, cfg.hidden, cfg.dim, cfg.k, cfg.tau_s, cfg.centering, common.gather)


def most(a, share=.6):                                           # attention [..,N] -> bool [..,N]
    """The fewest patches that hold this share of the attention."""
    a, order = a.sort(descending=True)
    before = a.cumsum(-1) - a                                    # what the patches ahead hold
    return (before < share * a.sum(-1, keepdim=True)).gather(-1, order.argsort(-1))


@torch.no_grad()
def attend(encoder, images, masks, times=2):                     # uint8 [n,3,H,W], [n,H,W]
    """Attention [n,heads,H,W] of images enlarged so; the mask of the head nearest to the object; its IoU."""
    x = F.interpolate(normalise(images), scale_factor=times, mode="bilinear")
    a = encoder.eval().attention(x)                              # [n,heads,h,w]
    seen = most(a.flatten(2)).view_as(a)
    a, seen = (F.interpolate(y.float(), masks.shape[1:]) for y in (a, seen))     # nearest, [n,heads,H,W]
    return a, *nearest(seen > 0, masks)


def nearest(seen, masks):                                        # bool [n,heads,H,W], [n,H,W]
    """The mask [n,H,W] of the head nearest to the object, chosen for each image by the truth; its IoU [n]."""
    there = masks[:, None] > 0
    iou = (seen & there).sum((2, 3)) / (seen | there).sum((2, 3))        # [n,heads]
    iou, head = iou.max(1)                                       # [n]
    return seen[torch.arange(len(seen), device=seen.device), head], iou


def discs(masks):                                                # [n,H,W] -> bool [n,4,H,W]
    """Four heads that never look: discs near the middle, of a size that suits the toys of training images."""
    y, x = torch.meshgrid(*[(torch.arange(n, device=masks.device) + .5) / n - .5 for n in masks.shape[1:]],
                          indexing="ij")
    four = [(y - i) ** 2 + (x - j) ** 2 < .25 ** 2 for i in (-.1, .1) for j in (-.1, .1)]
    return torch.stack(four).expand(len(masks), -1, -1, -1)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {f"ln {cfg.k}": math.log(cfg.k)}, optimizer)
    one = dict(scale=(cfg.crop, 1.), jitter=(.4, .4, .2, .1), grey=.2, blur=float(cfg.blur > 0))
    two = one | dict(blur=cfg.blur, solarise=cfg.solarise)
    local = one | dict(scale=(cfg.crop_local, cfg.crop), blur=.5 * (cfg.blur > 0))

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        optimizer.param_groups[0]["weight_decay"] = cosine(step, run.total, cfg.weight_decay, cfg.decay_end)
        tau_t = cfg.tau_t + (cfg.tau_t_end - cfg.tau_t) * min(1, step / max(1, cfg.rise * run.total))
        v1, v2 = views(x, cfg.size, **one), views(x, cfg.size, **two)
        small = [views(x, cfg.size_local, **local) for _ in range(cfg.local)]
        with run.autocast():
            loss = model(v1, v2, *small, tau_t=tau_t if cfg.sharpening else cfg.tau_s)
        optimizer.zero_grad()
        run.finite(loss).backward()
        for p in method.student.parameters():
            nn.utils.clip_grad_norm_(p, cfg.clip or math.inf)
        if step < int(cfg.freeze * run.total):
            method.student[1].prototypes.weight.grad = None      # no step, no weight decay
        optimizer.step()
        m = cosine(step, run.total, cfg.m, 1.)
        method.update_teacher(m)
        run.log(loss, h=method.h, **method.parts, m=m)

    common.save_neighbours(run.folder / "neighbours.png", method.encoder, data)
    if data.test_masks is None or not hasattr(method.encoder, "attention"):
        return run.finish()
    x, masks = data.test_images[:300], data.test_masks[:300]
    (a, seen, iou), (*_, before) = (attend(e, x, masks) for e in (method.encoder, run.untrained))
    maps = {f"head {i}": y / y.amax((1, 2), keepdim=True) for i, y in enumerate(a.unbind(1), 1)}  # [n,H,W]
    maps |= {"60 % of the best": seen, "the object": masks > 0}
    rows = {"x": x[:10]} | {name: y[:10, None].expand(-1, 3, -1, -1) for name, y in maps.items()}
    common.save_grid(run.folder / "attention.png", rows, "attention of [CLS] in the teacher's last block")
    found = dict(iou=iou, iou_untrained=before, iou_discs=nearest(discs(masks), masks)[1])
    return run.finish(**{name: y.mean().item() for name, y in found.items()})


if __name__ == "__main__":
    main(parse(Config, PAPER))
