"""Supervised (2016): the labels; the bound for all others.

The same encoder trained with the labels: what the other methods are read against.

He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016, arXiv 1512.03385.

    x [B,3,H,W] --augment--> v [B,3,H,W] --> encoder (kept) --> h [B,D] --linear--> logits [B,K]
                                                                  label y [B] <--loss--'

Good at: the classes that it was given, with many labels. Not at: anything that the labels do not ask for.

Run      python methods/supervised.py
         linear 97.0 ± 0.2 % (untrained 27.2; each seed at least +69), k-NN 96.8 ± 0.3 (21.9); 31 s on 2 cores
Differs  the rate follows a cosine, not steps; views are resized crops; no colour augmentation; momentum is
         Nesterov's, biases and norms do not decay; the quick run has AdamW and larger crops.
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
from kernels.views import normalise, views


@dataclass
class Config(common.Config):
    steps: int = 900               # optimisation steps
    lr: float = 2e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    classes: int = 10              # classes of the data
    crop: float = .6               # smallest share of the image's area in a view


# Section 3.4: 600,000 iterations of 256 images are 120 epochs of ImageNet.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="resnet50", epochs=120, batch_size=256,
             optimizer="sgd", lr=.1, weight_decay=1e-4, warmup=0., classes=1000, crop=.08)


class Supervised(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]."""

    def __init__(self, encoder, classes=10):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.dim, classes)

    def forward(self, v, y):                                     # [B,3,H,W], [B] -> loss
        self.h = self.encoder(v)                                 # [B,D]
        return F.cross_entropy(self.classifier(self.h), y)

    @torch.no_grad()
    def predict(self, x):                                        # [B,3,H,W] -> classes [B], in eval mode
        return self.eval().classifier(self.encoder(x)).argmax(1)


def build(cfg):
    return Supervised(make_encoder(cfg), cfg.classes)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    if data.labels is None:
        common.fail(f"--data {cfg.data} has no labels, which this method learns from")
    if len(data.classes) != cfg.classes:
        common.fail(f"--data {cfg.data} has {len(data.classes)} classes: give --classes {len(data.classes)}")
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {"ln classes": math.log(cfg.classes)}, optimizer)

    for step, index in run.steps(len(data.images)):
        x, y = data.images[index], data.labels[index]            # [B,3,H,W] uint8, [B]
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v, y)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h)

    predicted = torch.cat([method.predict(normalise(x)) for x in data.test_images.split(500)])
    told = predicted.unique().tolist()[:10]
    rows = {data.classes[i]: data.test_images[predicted == i][:10] for i in told}
    common.save_grid(run.folder / "predictions.png", rows, "test images by predicted class")
    return run.finish(accuracy=common.percent(predicted, data.test_labels))


if __name__ == "__main__":
    main(parse(Config, PAPER))
