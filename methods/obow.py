"""OBoW (2021): predict the visual words of a slow copy.

Gidaris, Bursuc, Puy, Komodakis, Cord, Perez. OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised
Learning. CVPR 2021, arXiv 2012.11552.

    x [B,3,H,W] -----------> teacher --> maps [B,C,h,w] --soft words, max over places--> // y [B,K]
                               ~~> m       '--a place of each--> queue of K words --generator--> w_k [D]
                --crops--> v --> encoder (kept) --> h [nB,D] --kappa h . w_k--> logits [nB,K] <--loss-- y

Good at: context, for a crop must tell what lies outside. Not at: starting; its first words are random.

Run      python methods/obow.py
         linear 48.6 ± 1.9 % (untrained 27.9; each seed at least +17), k-NN 38.2 ± 5.2 (22.2); 46 s on 2 cores
Differs  cross-entropy, not KL: same gradient; patches drawn singly; small maps keep their border; Nesterov,
         biases, norms do not decay; rate to 0; quick: AdamW, few words, no patches, blur, kappa 1, m .95.
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
from kernels.evaluation import patches_by_word
from kernels.views import normalise, views


@dataclass
class Config(common.Config):
    steps: int = 1000              # optimisation steps
    batch_size: int = 64           # images a step, all processes together
    lr: float = 3e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    k: int = 512                   # number of visual words in each queue
    inv_delta: float = 10.         # sharpness of the soft words
    kappa: float = 1.              # scale of the logits
    m: float = .95                 # momentum of the teacher at the start; rises to 1 by a cosine
    crop: float = .2               # smallest share of the image's area in a crop
    crop_max: float = 1.           # largest share
    crop_size: int = 24            # side of the two crops in pixels
    blur: float = 0.               # probability of blur in a crop
    patches: int = 0               # number of patches, small crops of 8 to 15 % of the image's area
    patch_size: int = 16           # side of the patches in pixels


# Official code, full version: warm-up 10 epochs.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=200, batch_size=256,
             optimizer="sgd", lr=.03, warmup=.05, k=8192, inv_delta=15., kappa=8., m=.99, crop=.08,
             crop_max=.6, crop_size=160, blur=.5, patches=5, patch_size=96)


class Vocabulary(nn.Module):
    """A queue of K words [K,C], oldest first, and the classifier that is generated from them."""
    def __init__(self, k, channels, dim, inv_delta, gather):
        super().__init__()
        self.inv_delta, self.gather = inv_delta, gather
        self.register_buffer("words", torch.randn(k, channels).clamp(min=0))
        self.register_buffer("mu", torch.tensor(.5))             # mean squared distance to the nearest word
        self.generator = nn.Sequential(nn.Linear(channels, 2 * dim, bias=False), nn.BatchNorm1d(2 * dim),
                                       nn.ReLU(), nn.Linear(2 * dim, dim))

    def weights(self):                                           # -> [K,D]
        return F.normalize(self.generator(F.normalize(self.words, dim=1)), dim=1)

    def bag_of_words(self, maps):                                # [B,C,h,w] -> [B,K]
        maps = maps[:, :, 1:-1, 1:-1] if maps.shape[2] >= 6 else maps
        d2 = torch.cdist(maps.flatten(2).mT, self.words).square()  # [B,h*w,K]
        self.mu.lerp_(self.gather(d2.amin(2)).mean(), .01)
        new = F.avg_pool2d(maps, min(3, maps.shape[2]), 1).flatten(2)    # [B,C,n], 3 x 3 places each
        self.new = new[torch.arange(len(new)), :, torch.randint(new.shape[2], (len(new),))]      # [B,C]
        return F.normalize((-self.inv_delta / self.mu * d2).softmax(2).amax(1), p=1, dim=1)

    def enqueue(self):
        self.words.copy_(torch.cat([self.words, self.gather(self.new)])[-len(self.words):])


class OBoW(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]; .layers(x)[-2:] are maps of these channels. Call
    update_teacher(m) before every step and enqueue() after it. gather: [B,...] -> rows of all processes."""
    def __init__(self, encoder, channels, k=512, inv_delta=10., kappa=1., gather=lambda z: z):
        super().__init__()
        self.encoder, self.kappa, self.teacher = encoder, kappa, copy.deepcopy(encoder).requires_grad_(False)
        self.levels = nn.ModuleList(Vocabulary(k, c, encoder.dim, inv_delta, gather) for c in channels)

    def forward(self, x, *crops):                                # clean; crops [nB,3,s,s] by size -> loss
        weights = [level.weights() for level in self.levels]     # [K,D] each
        h = [self.encoder(v) for v in crops]                     # [nB,D] each
        with torch.no_grad():                                    # in training mode: its own batch statistics
            maps = self.teacher.layers(x)[-2:]                   # [B,C,h,w] each
            bags = [level.bag_of_words(a) for level, a in zip(self.levels, maps, strict=True)]  # [B,K]
        loss = sum(F.cross_entropy(self.kappa * f @ w.T, y.repeat(len(f) // len(y), 1))
                   for f in h for w, y in zip(weights, bags, strict=True)) / len(bags)
        self.h, self.kl = h[0], loss.detach() - len(h) * torch.special.entr(torch.stack(bags)).sum(2).mean()
        self.perplexity = torch.special.entr(bags[0].mean(0)).sum().exp()
        return loss

    @torch.no_grad()
    def update_teacher(self, m):                                 # weights only, not BatchNorm's buffers
        for t, s in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            t.lerp_(s, 1 - m)

    def enqueue(self):
        for level in self.levels:
            level.enqueue()


def build(cfg):
    maps = make_encoder(cfg).layers(torch.zeros(2, 3, cfg.image_size, cfg.image_size))[-2:]
    return OBoW(make_encoder(cfg), [a.shape[1] for a in maps], cfg.k, cfg.inv_delta, cfg.kappa, common.gather)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    kinds = [(2, cfg.crop_size, (cfg.crop, cfg.crop_max), cfg.blur)]     # number, size, share of area, blur
    kinds += [(cfg.patches, cfg.patch_size, (.08, .15), 0.)] * (cfg.patches > 0)
    reference = {" + ".join(len(kinds) * [f"ln {cfg.k}"]): len(kinds) * math.log(cfg.k)}
    model = run.start(method, data, reference, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        crops = [torch.cat([views(x, size, scale=area, jitter=(.4, .4, .4, .1), grey=.2, blur=blur)
                            for _ in range(n)]) for n, size, area, blur in kinds]    # [nB,3,size,size] each
        m = cosine(step, run.total, cfg.m, 1.)
        method.update_teacher(m)                                 # before its forward
        with run.autocast():
            loss = model(views(x, scale=None, p_jitter=0, grey=0), *crops)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        method.enqueue()                                         # after the words have served
        run.log(loss, h=method.h, kl=method.kl, perplexity=method.perplexity, m=m)

    x = data.test_images[:500]
    d = torch.cdist(method.teacher.eval().layers(normalise(x))[-2].flatten(2).mT, method.levels[0].words)
    common.save_grid(run.folder / "words.png", patches_by_word(d, x), "words by use")
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
