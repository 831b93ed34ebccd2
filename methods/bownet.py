"""BoWNet (2020): predict the visual words of the clean image.

A network taught by rotation splits the clean image into visual words; a new one predicts them from a view.

Gidaris, Bursuc, Komodakis, Perez, Cord. Learning Representations by Predicting Bags of Visual Words.
CVPR 2020, arXiv 2002.12247.

    x [B,3,H,W] -----------> teacher (RotNet, fixed) --> map [B,C,h,w] --nearest word--> // y [B,K]
                --view--> v --> encoder (kept) --> h [B,D] --gamma h . w_k--> logits [B,K] <--loss--'

Good at: invariance to the view, with no risk of a collapse. Not at: what the first network does not see.

Run      python methods/bownet.py
         linear 66.4 ± 2.4 % (untrained 27.9; each at least +35), k-NN 57.0 ± 3.2 (22.2); 71 s on 2 cores
Differs  no CutMix; words are noted, not counted; k-means sees 1,024 images; --paper has CIFAR-10 for 100, a
         ResNet-18, Nesterov, no decay of biases and norms, a cosine, and one rate, one batch for both stages;
         the quick run has AdamW, few words, a short first stage.
"""
import copy
import math
import sys
import time
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
    steps: int = 1200              # optimisation steps of the second stage
    batch_size: int = 64           # images a step, all processes together
    lr: float = 3e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    crop: float = .3               # smallest share of the image's area in a view
    first: float = .35             # steps of the first stage, rotation, as a share of the second's
    k: int = 512                   # number of visual words


# There is no official code: a reproduction on CIFAR, github.com/StoneY1/Reproducing-BowNet.
PAPER = dict(data="cifar10", encoder="resnet18", epochs=150, batch_size=128, optimizer="sgd", lr=.05,
             weight_decay=5e-4, warmup=0., first=1., k=2048)


def kmeans(x, k, iterations=10):                                 # [N,C] -> words [K,C]
    words = x[torch.randint(len(x), (k,))]
    for _ in range(iterations):
        word = torch.cdist(x, words).argmin(1)                   # [N]
        count = word.bincount(minlength=k)[:, None]              # [K,1]
        means = torch.zeros_like(words).index_add_(0, word, x) / count
        words = torch.where(count > 0, means, x[torch.randint(len(x), (k,))])           # the dead move
    return words


class BoWNet(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]; .layers(x)[-2] is a map [B,channels,h,w]. The
    teacher, its copy, must be trained first, by rotation here, then words set: k-means of its places."""

    def __init__(self, encoder, channels, k=512):
        super().__init__()
        self.encoder, self.weight = encoder, nn.Parameter(torch.randn(k, encoder.dim) / encoder.dim ** .5)
        self.gamma = nn.Parameter(torch.tensor(1.))
        self.teacher = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.register_buffer("words", torch.zeros(k, channels))  # [K,C]

    def distances(self, x):                                      # [B,3,H,W] -> from places to words [B,h*w,K]
        return torch.cdist(self.teacher.eval().layers(x)[-2].flatten(2).mT, self.words)

    def forward(self, x, v):                                     # [B,3,H,W] each, clean and view -> loss
        self.h = self.encoder(v)                                 # [B,D]
        logits = self.gamma * self.h @ F.normalize(self.weight, dim=1).T  # [B,K]
        with torch.no_grad():
            found = F.one_hot(self.distances(x).argmin(2), len(self.words)).amax(1)     # [B,K] 0 or 1
            y = F.normalize(found.float(), p=1, dim=1)
        loss = F.cross_entropy(logits, y)
        self.kl = loss.detach() - torch.special.entr(y).sum(1).mean()
        self.perplexity = torch.special.entr(y.mean(0)).sum().exp()
        return loss


def build(cfg):
    channels = make_encoder(cfg).layers(torch.zeros(2, 3, cfg.image_size, cfg.image_size))[-2].shape[1]
    return BoWNet(make_encoder(cfg), channels, cfg.k)


def first_stage(cfg, run, images):                               # -> encoder, words [K,C]
    """RotNet, then k-means of its local features. Each process does all of it; the first one's is taken."""
    encoder, steps = make_encoder(cfg), math.ceil(cfg.first * run.total)
    net = nn.Sequential(encoder, nn.Linear(encoder.dim, 4)).to(run.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(cfg, net)
    k = torch.arange(4, device=run.device).repeat_interleave(cfg.batch_size)     # [4B]
    run.print(f"first stage: {steps} steps of rotation, then k-means")
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, cfg.lr, warmup=cfg.warmup))
        v = views(images[torch.randint(len(images), (cfg.batch_size,))], scale=(.7, 1.), p_jitter=0, grey=0)
        loss = F.cross_entropy(net(torch.cat([v.rot90(turn, (2, 3)) for turn in range(4)])), k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        maps = encoder.eval().layers(normalise(images[torch.randperm(len(images))[:1024]]))[-2]
        return encoder, kmeans(maps.flatten(2).mT.flatten(0, 1), cfg.k)  # of [1024*h*w,C]


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {f"ln {cfg.k}": math.log(cfg.k)}, optimizer)
    if not run.first:                                            # a resumed run has teacher and words
        began = time.perf_counter()
        encoder, words = first_stage(cfg, run, data.images)
        state = {k: common.gather(v[None])[0] for k, v in encoder.state_dict().items()}
        method.teacher.load_state_dict(state)                    # of the first process, as the words are
        method.words.copy_(common.gather(words)[:cfg.k])
        run.seconds = time.perf_counter() - began

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), jitter=(.4, .4, .4, .1), grey=.2)
        with run.autocast():
            loss = model(normalise(x), v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, kl=method.kl, perplexity=method.perplexity)

    x = data.test_images[:500]
    d = method.distances(normalise(x))                           # [N,h*w,K]
    common.save_grid(run.folder / "words.png", patches_by_word(d, x), "words by use")
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
