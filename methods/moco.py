"""MoCo (2020): find the other view among queued keys.

A query must find the key of its image's other view among those of many batches, made by a slow copy.

v1  He, Fan, Wu, Xie, Girshick. Momentum Contrast for Unsupervised Visual Representation Learning.
    CVPR 2020, arXiv 1911.05722.
v2  Chen, Fan, Girshick, He. Improved Baselines with Momentum Contrastive Learning. 2020, arXiv 2003.04297.
v3  Chen, Xie, He. An Empirical Study of Training Self-Supervised Vision Transformers. ICCV 2021, 2104.02057.

    x [B,3,H,W] --view--> v1 --> encoder (kept) --> h [B,D] --> projector --> q [B,P] --+
                                   ~~> m                          ~~> m                 |  loss: q finds its k
                --view--> v2 --> teacher encoder --> teacher projector --> // k [B,P] --+  among 1+K, Eq. 1
                after the step: k goes in, the oldest keys fall out --> queue [K,P] ----'
    v3: the batch is its own queue; q passes a predictor; the same with v1 and v2 exchanged, summed

Good at: image-level features from small batches, for the queue brings the negatives. Not at: what the views
change; a fast teacher, whose old keys no longer fit the new. BatchNorm can tell a query which keys share its
batch: hence groups with statistics of their own, among which the keys are shuffled (v1 and v2).

Run      python methods/moco.py
         linear 41.6 ± 1.2 % (untrained 27.2; each seed at least +13), k-NN 30.7 ± 1.1 (21.9); 59 s on 2 cores
         python methods/moco.py --version 3 --encoder vit_micro/8 --batch_size 64 --steps 600
         seed 0: linear 36.1 % (untrained 17.8), k-NN 18.6 (13.3)
Differs  the queue starts with keys in place of random rows, so that the loss starts near ln(K+1); v1 and v3
         have v2's views, v1 its rate; momentum is Nesterov's, biases and norms do not decay; a ViT's weights
         start otherwise; the quick run has AdamW, a short queue, a faster teacher and no blur.
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
from kernels.info_nce import info_nce
from kernels.views import denormalise, views


@dataclass
class Config(common.Config):
    steps: int = 800               # optimisation steps
    version: int = 2               # 1: one linear layer projects; 2: two; 3: no queue, a predictor
    hidden: int = 512              # width of the hidden layers of projector and predictor
    dim: int = 128                 # width of q and k
    tau: float = .2                # temperature of the similarities
    queue: int = 4096              # keys K in the queue, at most one for each image
    m: float = .99                 # momentum of the teacher; in version 3 it rises to 1 by a cosine
    splits: int = 4                # groups with BatchNorm statistics of their own, as on GPUs; not in v3
    shuffle: bool = True           # shuffle the keys among the groups
    crop: float = .2               # smallest share of the image's area in a view
    blur: float = 0.               # probability of a Gaussian blur, for images of 64 px and more


# Official code, version 2. Version 3, a ViT-S of 12 heads: --version 3 --encoder vit_small_moco/16
# --epochs 300 --warmup .133 --batch_size 4096 --optimizer adamw --lr 2.4e-3 --weight_decay .1 --hidden 4096
# --dim 256 --m .99 --crop .08. Version 1: --version 1 --tau .07 --blur 0.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=200, batch_size=256,
             optimizer="sgd", lr=.03, warmup=0., hidden=2048, queue=65536, m=.999, splits=8, blur=.5)


def mlp(widths, norm=True):                                      # of version 3
    pairs = zip(widths[:-2], widths[1:-1], strict=True)
    hidden = [(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairs]
    last = [nn.BatchNorm1d(widths[-1], affine=False)] if norm else []
    return nn.Sequential(*sum(hidden, ()), nn.Linear(*widths[-2:], bias=False), *last)


class MoCo(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. gather: [B,P] -> the rows of all processes. Call
    update_teacher(m) before each step and, but in version 3, enqueue(method.k) after it. The queue starts as
    noise: fill it first, by enqueue(keys(v))."""

    def __init__(self, encoder, version=2, hidden=512, dim=128, tau=.2, queue=4096, splits=4, shuffle=True,
                 gather=lambda z: z):
        super().__init__()
        if version not in (1, 2, 3):
            raise ValueError(f"version must be 1, 2 or 3, got {version}")
        self.encoder, self.version, self.tau, self.gather = encoder, version, tau, gather
        self.splits, self.shuffle = splits if version < 3 else 1, shuffle
        self.projector, self.predictor = nn.Linear(encoder.dim, dim), nn.Identity()
        if version == 2:
            self.projector = nn.Sequential(nn.Linear(encoder.dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        if version == 3:
            vit = hasattr(encoder, "patch_embed")
            self.projector = mlp([encoder.dim, hidden, *[hidden] * vit, dim])
            self.predictor = mlp([dim, hidden, dim], norm=vit)
            if vit:                                              # for stability it stays as it is drawn
                encoder.patch_embed.requires_grad_(False)
        self.teacher = copy.deepcopy(nn.Sequential(self.encoder, self.projector)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))       # [K,P] newest first

    def forward(self, v1, v2):                                   # [B,3,H,W] each -> loss
        loss = self.direction(v1, v2)
        return loss if self.version < 3 else loss + self.direction(v2, v1)

    def direction(self, v1, v2):                                 # queries of v1, keys of v2
        self.h = torch.cat([self.encoder(group) for group in v1.chunk(self.splits)])     # [B,D]
        self.z = self.projector(self.h)                          # [B,P]
        q = F.normalize(self.predictor(self.z), dim=1)           # [B,P]
        self.k = self.keys(v2)                                   # [B,P]
        if self.version < 3:
            # = cross_entropy([q.k, q @ queue.T] / tau, target 0)                         v1, Eq. 1
            return info_nce(q, self.queue, self.k, self.tau)
        q, k = self.gather(q), self.gather(self.k)               # of all processes
        return 2 * self.tau * info_nce(q, k, torch.arange(len(q), device=q.device), self.tau)

    @torch.no_grad()
    def keys(self, v):                                           # in training mode: own batch statistics
        order = torch.randperm(len(v)) if self.shuffle else torch.arange(len(v))         # [B]
        k = torch.cat([self.teacher(group) for group in v[order].chunk(self.splits)])    # [B,P]
        return F.normalize(k[order.argsort()], dim=1)            # back in the images' order

    @torch.no_grad()
    def update_teacher(self, m):                                 # weights only, not BatchNorm's buffers
        student = nn.Sequential(self.encoder, self.projector)
        for t, s in zip(self.teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s, 1 - m)                                    # v1, Eq. 2

    def enqueue(self, k):                                        # [B,P] in front; the oldest fall out
        self.queue = torch.cat([self.gather(k), self.queue])[:len(self.queue)]


def build(cfg):
    if cfg.version not in (1, 2, 3):
        common.fail(f"--version {cfg.version} is unknown: give 1, 2 or 3")
    fixed = dict(positions="sincos") if cfg.version == 3 and cfg.encoder.startswith("vit") else {}
    return MoCo(make_encoder(cfg, **fixed), cfg.version, cfg.hidden, cfg.dim, cfg.tau, cfg.queue, cfg.splits,
                cfg.shuffle, common.gather)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    cfg.queue = min(cfg.queue, len(data.images))                 # longer, it would hold an image twice
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    options = dict(scale=(cfg.crop, 1.), jitter=(.4, .4, .4, .1), grey=.2, blur=cfg.blur)
    reference = {f"4 tau ln {cfg.batch_size}": 4 * cfg.tau * math.log(cfg.batch_size)}
    if cfg.version < 3:
        reference = {f"ln {cfg.queue + 1}": math.log(cfg.queue + 1)}
        drawn = torch.randint(len(data.images), (common.rank() + 1, cfg.queue))[-1]  # each process its own
        for index in drawn.split(cfg.batch_size):
            method.enqueue(method.keys(views(data.images[index], **options)))
    model = run.start(method, data, reference, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v1, v2 = views(x, **options), views(x, **options)
        m = cosine(step, run.total, cfg.m, 1. if cfg.version == 3 else cfg.m)
        method.update_teacher(m)
        with run.autocast():
            loss = model(v1, v2)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        if cfg.version < 3:
            method.enqueue(method.k)
        run.log(loss, h=method.h, z=method.z, m=m)

    x = data.test_images[:10]
    v1, v2 = (denormalise(views(x, **options)) for _ in range(2))
    common.save_grid(run.folder / "views.png", {"x": x, "v1": v1, "v2": v2})
    common.save_neighbours(run.folder / "neighbours.png", method.encoder, data)
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
