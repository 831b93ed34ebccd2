"""Transfer (2022): frozen features and fine-tuning, with few labels.

The lecture's second stage. A network that learned without labels is given some: its frozen features are
classified by k-NN and by a linear probe, then all of it is trained further, deep layers faster than shallow.

He, Chen, Xie, Li et al. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022, arXiv 2111.06377, A.1.
Layer-wise decay: Clark et al., ICLR 2020, arXiv 2003.10555; 1 and 10 % of the labels: SimCLR, 2002.05709.

    --run FOLDER --> its encoder, pre-trained --frozen--> h [n,D] --> k-NN, linear probe
    or nothing: untrained                     '--v [B,3,H,W]--> h [B,D] --linear--> [B,classes] <--loss-- y
                                                   layer i of L at decay^(L+1-i) of the rate

Good at: telling what pre-training is worth, against the same network from scratch. Not at: comparing networks
of different size.

Run      python methods/transfer.py --run runs/mae-toys-seed0 --labels .1
         seed 0 alone: 48.2 % fine-tuned, 37.9 frozen and probed; from scratch 41.5
Differs  no mixup, no RandAugment, no stochastic depth; a crop and a flip alone.
"""
import importlib
import json
import math
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, parse, set_lr
from kernels.encoders import read_checkpoint
from kernels.views import normalise, views


@dataclass
class Config(common.Config):
    run: str = ""                  # folder of a finished run: its data and encoder; else --encoder, untrained
    labels: float = 1.             # share of the labelled images, of each class
    steps: int = 300               # optimisation steps
    batch_size: int = 64           # images a step, all processes together
    weight_decay: float = .05      # on weights and tokens, not on biases and norms
    decay: float = .75             # rate of a layer as a share of that of the next deeper one
    smoothing: float = .1          # of the labels
    crop: float = .6               # smallest share of the image's area in a view


# Official code, fine-tuning of ViT-B: rate 5e-4 x B/256, warm-up 5 of 100 epochs.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="vit_base/16", epochs=100, batch_size=1024,
             lr=2e-3, warmup=.05, decay=.65, crop=.08)


class Transfer(nn.Module):
    """encoder: images [B,3,H,W] -> [B,encoder.dim]."""

    def __init__(self, encoder, classes=10, smoothing=.1):
        super().__init__()
        self.encoder, self.classifier, self.smoothing = encoder, nn.Linear(encoder.dim, classes), smoothing

    def forward(self, v, y):                                     # [B,3,H,W], [B] -> loss
        self.h = self.encoder(v)                                 # [B,D]
        return F.cross_entropy(self.classifier(self.h), y, label_smoothing=self.smoothing)

    @torch.no_grad()
    def predict(self, x):                                        # [B,3,H,W], normalised -> classes [B]
        return self.eval().classifier(self.encoder(x)).argmax(1)


def scratch(cfg):
    return make_encoder(cfg, **dict(pool="mean") if cfg.encoder.startswith("vit") else {})


def build(cfg):
    return Transfer(scratch(cfg), smoothing=cfg.smoothing)


def pretrained(folder):                                          # -> its encoder, what the run was given
    """The encoder of a finished run, built by the run's own method."""
    try:
        result = json.loads((folder / "result.json").read_text())
        module = importlib.import_module(result["method"])       # in the folder of this file
        known = {f.name for f in fields(module.Config)}
        cfg = module.Config(**{k: v for k, v in result["flags"].items() if k in known})
        encoder = module.build(cfg).encoder
        encoder.load_state_dict(read_checkpoint(folder / "encoder.pt"), strict=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as e:
        common.fail(f"--run {folder} is no folder of a finished run ({str(e).splitlines()[0]})")
    return encoder.requires_grad_(True), cfg


def some_of_each_class(labels, share):                           # [N] -> [n]
    parts = [(labels == y).nonzero()[:, 0] for y in labels.unique().tolist()]
    return torch.cat([p[torch.randperm(len(p), device=p.device)[:math.ceil(share * len(p))]] for p in parts])


def by_layer(method, decay, weight_decay):                       # -> parameter groups, each with its scale
    """Layer i of L learns at decay^(L+1-i) of the rate: 0 is the embedding, L+1 the last norm, the head."""
    where = {}
    for name, p in method.named_parameters():
        m = re.search(r"blocks\.(\d+)\.|layer(\d)\.", name)
        behind = re.search(r"(^|encoder\.)(norm|classifier)\.", name)
        where[p] = int(m[1] or int(m[2]) - 1) + 1 if m else math.inf if behind else 0
    last = 1 + max(i for i in where.values() if i < math.inf)
    return [dict(params=[p], scale=decay ** (last - min(i, last)), weight_decay=weight_decay * (p.ndim > 1))
            for p, i in where.items()]


def main(cfg):
    folder = Path(cfg.run).expanduser()
    encoder, source = pretrained(folder) if cfg.run else (None, cfg)
    if cfg.run:                                                  # the same data and network
        cfg.out, cfg.weights, cfg.encoder = str(folder), str(folder / "encoder.pt"), source.encoder
        cfg.data, cfg.data_dir, cfg.image_size = source.data, source.data_dir, source.image_size
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    if data.labels is None:
        common.fail(f"--data {cfg.data} has no labels, without which there is no transfer")
    chosen = some_of_each_class(data.labels, cfg.labels)
    data = data._replace(images=data.images[chosen], labels=data.labels[chosen])
    method = Transfer(encoder or scratch(cfg), len(data.classes), cfg.smoothing).to(run.device)
    groups = by_layer(method, cfg.decay if cfg.weights else 1., cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, cfg.lr)
    model = run.start(method, data, {"ln classes": math.log(len(data.classes))}, optimizer)

    for step, index in run.steps(len(data.images)):
        x, y = data.images[index], data.labels[index]            # [B,3,H,W] uint8, [B]
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        for group in optimizer.param_groups:
            group["lr"] *= group["scale"]
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v, y)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h)

    predicted = torch.cat([method.predict(normalise(x)) for x in data.test_images.split(500)])
    rows = {name: data.test_images[predicted == i][:10] for i, name in enumerate(data.classes[:10])}
    rows = {name: x for name, x in rows.items() if len(x)}
    common.save_grid(run.folder / "predictions.png", rows, "test images by predicted class")
    return run.finish(labelled=len(chosen), accuracy=common.percent(predicted, data.test_labels))


if __name__ == "__main__":
    main(parse(Config, PAPER))
