"""SimSiam (2021): predict the other view, through a stop-gradient.

Predict from one view what the same network says of another; no gradient flows into what is predicted.

Chen, He. Exploring Simple Siamese Representation Learning. CVPR 2021, arXiv 2011.10566.

    x [B,3,H,W] --view--> v1 --> encoder (kept) --> h1 --> projector --> z1 --> predictor --> p1 [B,P]
                                       |                       |                                 | loss, Eq. 1
                --view--> v2 --> the same --------------> the same ----> // z2 [B,P] <-----------'
    and the same with v1 and v2 exchanged; both directions are averaged

Good at: image-level features from small batches, with neither negatives nor a teacher. Not at: showing that
it works: a constant has the best loss, -1, too (watch std and rank).

Run      python methods/simsiam.py
         linear 40.1 ± 2.2 % (untrained 27.2; each seed at least +11), k-NN 24.4 ± 1.3 (21.9); 71 s on 2 cores
Differs  momentum is Nesterov's, biases and norms do not decay, blocks do not start as the identity; the quick
         run has AdamW, the two-layer projector that the paper has for CIFAR-10, larger crops and no blur.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.views import views


@dataclass
class Config(common.Config):
    steps: int = 1300              # optimisation steps
    batch_size: int = 64           # images a step, all processes together
    layers: int = 2                # of the projector
    dim: int = 512                 # width of z and p, and of the projector's hidden layers
    bottleneck: int = 128          # width of the predictor's hidden layer
    crop: float = .3               # smallest share of the image's area in a view
    blur: float = 0.               # probability of a Gaussian blur, for images of 64 px and more
    stop: bool = True              # the stop-gradient; without it the features collapse


# Official code: rate .05 x B/256.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=100, batch_size=512,
             optimizer="sgd", lr=.1, warmup=0., layers=3, dim=2048, bottleneck=512, crop=.2, blur=.5)


def direction(p, z):                                             # [B,P], [B,P] -> []
    return -F.cosine_similarity(p, z).mean()                     # Eq. 1


def mlp(widths):                                                 # BatchNorm after every layer but the last
    pairs = zip(widths[:-2], widths[1:-1], strict=True)
    hidden = [(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairs]
    return nn.Sequential(*sum(hidden, ()), nn.Linear(*widths[-2:]))


class SimSiam(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. stop: without it every image becomes one constant."""

    def __init__(self, encoder, layers=2, dim=512, bottleneck=128, stop=True):
        super().__init__()
        self.encoder, self.stop = encoder, stop
        self.projector = mlp([encoder.dim] + [dim] * layers)
        self.projector[-1] = nn.Linear(self.projector[-1].in_features, dim, bias=False)
        self.projector.append(nn.BatchNorm1d(dim, affine=False))
        self.predictor = mlp([dim, bottleneck, dim])

    def forward(self, v1, v2):                                   # [B,3,H,W] each -> loss
        self.h, h2 = self.encoder(v1), self.encoder(v2)          # [B,D] each
        self.z, z2 = self.projector(self.h), self.projector(h2)  # [B,P] each
        p1, p2 = self.predictor(self.z), self.predictor(z2)      # [B,P] each
        t1, t2 = (z.detach() if self.stop else z for z in (self.z, z2))
        return (direction(p1, t2) + direction(p2, t1)) / 2       # Eq. 4


def build(cfg):
    return SimSiam(make_encoder(cfg), cfg.layers, cfg.dim, cfg.bottleneck, cfg.stop)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, nn.ModuleList([method.encoder, method.projector]))
    p_optimizer = make_optimizer(cfg, method.predictor)          # its rate stays as it is
    model = run.start(method, data, {"independent": 0., "equal or constant": -1.}, optimizer, p_optimizer)
    options = dict(scale=(cfg.crop, 1.), jitter=(.4, .4, .4, .1), grey=.2, blur=cfg.blur)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v1, v2 = views(x, **options), views(x, **options)
        with run.autocast():
            loss = model(v1, v2)
        optimizer.zero_grad()
        p_optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        p_optimizer.step()
        run.log(loss, h=method.h, z=method.z)

    common.save_neighbours(run.folder / "neighbours.png", method.encoder, data)
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
