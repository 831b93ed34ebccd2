"""RotNet (2018): tell how far an image was turned.

Turn each image by 0, 90, 180 and 270 degrees and classify the turn.

Gidaris, Singh, Komodakis. Unsupervised Representation Learning by Predicting Image Rotations.
ICLR 2018, arXiv 1803.07728.

    x [B,3,H,W] --augment--> v [B,3,H,W] --all four turns--> [4B,3,H,W] --> encoder (kept) --> h [4B,D]
                                                turn k in 0..3 [4B] <--loss-- logits [4B,4] <-- linear <--'

Good at: features of objects with a usual pose, for the price of a classifier. Not at: round things, top
views, or data where something trivial tells what is up (--data toys:sky has such a shortcut).
A middle layer may be the best, so each is probed; here it is as good as the last.

Run      python methods/rotnet.py
         linear 61.6 ± 0.7 % (untrained 27.2; each seed at least +33), k-NN 55.6 ± 1.2 (21.9); layers 2
         and 3 in 2 x 2 cells linear 69.8, 70.2 (37.8, 34.7); 78 % of test turns told right; 47 s on 2 cores
Differs  the encoder is a ResNet, not a Network-in-Network; views are resized crops, not padded ones; the rate
         follows a cosine, not steps; biases and norms do not decay; layers are probed as they are, not by
         another convolutional block.
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
    steps: int = 700               # optimisation steps
    batch_size: int = 64           # images a step; each is seen in all four turns
    crop: float = .7               # smallest share of the image's area in a view


# Official code, CIFAR-10.
PAPER = dict(data="cifar10", encoder="resnet18", epochs=200, batch_size=128, optimizer="sgd", lr=.1,
             weight_decay=5e-4, warmup=0.)


def four_turns(x):                                               # [B,3,H,W] -> [4B,3,H,W], [4B]
    """Turned by k quarters counter-clockwise, and k. Transposes and flips: nothing is interpolated."""
    k = torch.arange(4, device=x.device).repeat_interleave(len(x))
    return torch.cat([x.rot90(turn, (2, 3)) for turn in range(4)]), k


class RotNet(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]. Images are square."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.dim, 4)

    def forward(self, v):                                        # [B,3,H,H] -> loss
        turned, k = four_turns(v)                                # [4B,3,H,H], [4B]
        self.h = self.encoder(turned)                            # [4B,D]
        logits = self.classifier(self.h)                         # [4B,4]
        self.accuracy = (logits.argmax(1) == k).float().mean()
        return F.cross_entropy(logits, k)                        # Eq. 2 and 3


def build(cfg):
    return RotNet(make_encoder(cfg))


@torch.no_grad()
def attention_maps(encoder, images):
    """Where a layer is active: the sum over its channels of a^2, as grey images [B,3,H,W] scaled to 0..1."""
    rows = {}
    for i, a in enumerate(encoder.eval().layers(normalise(images)), 1):  # [B,C,h,w]
        heat = F.interpolate(a.square().sum(1, keepdim=True), images.shape[2:], mode="bilinear")
        heat = heat - heat.amin((2, 3), keepdim=True)
        rows[f"layer {i}"] = (heat / heat.amax((2, 3), keepdim=True).clamp_min(1e-8)).expand(-1, 3, -1, -1)
    return rows


@torch.no_grad()
def failures(method, images, n=10):
    """The worst mistakes, n at most, as seen and as turned back by what the network said; accuracy in %."""
    method.eval()
    turned, k = four_turns(images)                               # [4B,3,H,W], [4B]
    logits = torch.cat([method.classifier(method.encoder(normalise(x))) for x in turned.split(500)])
    said = logits.argmax(1)                                      # [4B]
    loss = F.cross_entropy(logits, k, reduction="none").masked_fill(said == k, 0)        # [4B]
    worst = loss.topk(min(n, int((said != k).sum()))).indices
    back = [turned[i].rot90(-int(said[i]), (1, 2)) for i in worst]
    rows = {"seen": turned[worst], "turned back": torch.stack(back)} if back else {}
    return rows, common.percent(said, k)


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {"ln 4": math.log(4)}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)   # before turning, so that no border shows
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h, accuracy=method.accuracy)

    x = data.test_images[:10]
    common.save_grid(run.folder / "attention.png", {"test images": x} | attention_maps(method.encoder, x))
    rows, accuracy = failures(method, data.test_images[:500])
    if rows:
        common.save_grid(run.folder / "failures.png", rows, "the worst mistakes on turned test images")
    return run.finish(layers=True, turns_right=accuracy)


if __name__ == "__main__":
    main(parse(Config, PAPER))
