"""SwAV (2020): predict the cluster of another view.

Every view of an image predicts the code of another: its prototypes, when a batch uses all equally often.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin. Unsupervised Learning of Visual Features by Contrasting
Cluster Assignments. NeurIPS 2020, arXiv 2006.09882.

    x [B,3,H,W] --2 big, L small views--> encoder (kept) --> h [B,D] --> projector, |z| = 1 --> z [B,P] --.
     // codes q_1, q_2 [B,K] <--Sinkhorn-Knopp-- s_1, s_2 of the big <--+-- s_v [B,K] <-- prototypes <----'
                    '----- loss, for all v != i ----- softmax of s_v <--'

Good at: features and clusters without negatives or a teacher; small views are cheap. Not at: batches smaller
than the number of prototypes (hence --queue); many-coloured grounds (--data toys), which become the clusters.

Run      python methods/swav.py
         linear 64.2 ± 1.9 % (untrained 42.6; each seed at least +20), k-NN 59.9 ± 1.4 (39.3); 59 s on 2 cores
Differs  biases and norms have neither weight decay nor trust ratio; LARS has the rate inside the momentum;
         the rate rises from 0 and falls to 0; the queue counts from when it is full; the quick run has grey
         grounds, AdamW, larger crops, tau .25 and no blur.
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
from kernels.prototype_ce import prototype_ce_codes
from kernels.sinkhorn import sinkhorn
from kernels.views import views


@dataclass
class Config(common.Config):
    data: str = "toys:grey"        # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    steps: int = 500               # optimisation steps
    lr: float = 2e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    hidden: int = 512              # width of the projector's hidden layer
    dim: int = 64                  # width of z
    prototypes: int = 256          # K, how many
    tau: float = .25               # temperature of the softmax over prototypes
    eps: float = .05               # the same of the codes; the smaller, the sharper
    iterations: int = 3            # of Sinkhorn-Knopp; with 0 the codes are not balanced, and collapse
    queue: int = 0                 # earlier z of each big view among which the codes are balanced too
    freeze: float = .05            # part of the run in which the prototypes stay as they are
    local: int = 2                 # L, small views of an image
    size_local: int = 16           # side of the small views in pixels
    crop: float = .5               # smallest share of the image's area in a big view, largest in a small one
    crop_local: float = .2         # smallest share of the image's area in a small view
    blur: float = 0.               # probability of a Gaussian blur, for images of 64 px and more


# Official code; with batch size 256 it has rate .6, no warm-up, and a queue of 3840 from epoch 15.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=800, batch_size=4096,
             optimizer="lars", lr=4.8, weight_decay=1e-6, warmup=.0125, hidden=2048, dim=128, prototypes=3000,
             tau=.1, freeze=1 / 800, local=6, size_local=96, crop=.14, crop_local=.05, blur=.5)


class SwAV(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. gather: [B,P] -> the rows of all processes.
    Call normalise_prototypes() before every step and enqueue() after it."""

    def __init__(self, encoder, hidden=512, dim=64, prototypes=64, tau=.1, eps=.05, iterations=3, queue=0,
                 gather=lambda z: z):
        super().__init__()
        self.encoder, self.tau, self.eps, self.iterations, self.gather = encoder, tau, eps, iterations, gather
        self.projector = nn.Sequential(
            nn.Linear(encoder.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.register_buffer("queue", torch.full((2, queue, dim), torch.nan))    # NaN until it is full

    def forward(self, v1, v2, *small):                           # [B,3,H,W] twice, [B,3,h,w] ... -> loss
        h = [self.encoder(torch.cat(v)) for v in ((v1, v2), small) if v]         # [2B,D], [LB,D]
        z = F.normalize(self.projector(torch.cat(h)), dim=1).split(len(v1))      # 2+L times [B,P]
        z = [self.gather(z_v) for z_v in z]                      # of all processes
        s = self.prototypes(torch.cat(z))                        # [(2+L)B,K]
        q1, q2 = (self.codes(s_i, i) for i, s_i in enumerate(s.split(len(z[0]))[:2]))    # [B,K] each
        q = torch.cat([q2, q1] + [q1 + q2] * len(small))         # of the big views, but never a view's own
        self.h, self.z = h[0], torch.cat(z[:2])                  # [2B,D], [2B,P]
        usage = (s[:len(self.z)].detach() / self.tau).softmax(1).mean(0)         # [K]
        self.perplexity = torch.special.entr(usage).sum().exp()  # K if all are in equal use, 1 if one is
        return prototype_ce_codes(s, q, self.tau).sum() / (2 * (1 + len(small)) * len(z[0]))

    @torch.no_grad()
    def codes(self, s, i):                                       # scores of big view i [B,K] -> codes [B,K]
        if not self.iterations:
            return (s / self.eps).softmax(1)
        old = self.prototypes(self.queue[i]) if self.queue.isfinite().all() else s[:0]   # [Q,K]
        return sinkhorn(torch.cat([old, s]), self.eps, self.iterations)[len(old):]

    @torch.no_grad()
    def normalise_prototypes(self):
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def enqueue(self):
        z = torch.cat([torch.stack(self.z.chunk(2)), self.queue], 1)             # [2,B+Q,P], newest first
        self.queue.copy_(z[:, :self.queue.shape[1]])


def build(cfg):
    return SwAV(make_encoder(cfg), cfg.hidden, cfg.dim, cfg.prototypes, cfg.tau, cfg.eps, cfg.iterations,
                cfg.queue, common.gather)


def clusters(method, images, rows=8, n=10):
    """The prototypes that most images are nearest to, each with the n images nearest to it."""
    z = method.eval().projector(common.features(method.encoder, images))         # [N,P]
    s = method.prototypes(F.normalize(z, dim=1))                 # [N,K]
    most = s.argmax(1).bincount(minlength=s.shape[1]).topk(min(rows, s.shape[1])).indices         # [rows]
    return {f"prototype {k}": images[s[:, k].topk(min(n, len(s))).indices] for k in most.tolist()}


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {f"ln {cfg.prototypes}": math.log(cfg.prototypes)}, optimizer)
    options = dict(scale=(cfg.crop, 1.), jitter=(.8, .8, .8, .2), grey=.2, blur=cfg.blur)
    local = options | dict(size=cfg.size_local, scale=(cfg.crop_local, cfg.crop))

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v1, v2 = views(x, **options), views(x, **options)
        small = [views(x, **local) for _ in range(cfg.local)]    # [B,3,h,w] each
        method.normalise_prototypes()
        with run.autocast():
            loss = model(v1, v2, *small)
        optimizer.zero_grad()
        run.finite(loss).backward()
        if step < int(cfg.freeze * run.total):
            method.prototypes.weight.grad = None
        optimizer.step()
        method.enqueue()
        run.log(loss, h=method.h, z=method.z, perplexity=method.perplexity)

    common.save_grid(run.folder / "prototypes.png", clusters(method, data.test_images))
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
