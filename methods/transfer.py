"""Transfer (2022): frozen features and fine-tuning, with few labels.

A network that learned without labels is probed as it is; then it learns from labels, all of it.

He, Chen, Xie, Li et al. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022, arXiv 2111.06377, A.1.
Layer-wise decay: Clark et al., ICLR 2020, arXiv 2003.10555; 1 and 10 % of the labels: SimCLR, 2002.05709.

    --run FOLDER, --weights FILE --frozen--> h [n,D] --> k-NN, linear probe; a probe of each layer
    or neither, from scratch   |      '--> last map [n,D,h,w] --linear, enlarged--> [n,K,H,W] --> mIoU
                               '--v [B,3,H,W]--> h [B,D] --linear--> [B,classes] <--loss-- y

Good at: telling what pre-training is worth, beside the same network from scratch. Not at: comparing networks.

Run      python methods/transfer.py --run runs/rotnet-toys-seed0 --labels .01 --lr 3e-3 --steps 900
         200 labels: 58.9 ± 1.8 % fine-tuned, 37.5 ± 2.3 frozen and probed; from scratch 31.5 ± 2.2
Differs  crop, flip alone, no stochastic depth; [CLS], positions decay; norm before the mean; head not near 0.
"""
import importlib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, parse, set_lr
from kernels.encoders import read_checkpoint
from kernels.evaluation import class_iou, segment, some_of_each_class
from kernels.slots import coloured
from kernels.views import normalise, views


@dataclass
class Config(common.Config):
    data: str = ""                 # by default that of --run, else toys; also cifar10, folder:PATH
    run: str = ""                  # folder of a finished run: its encoder and size
    scratch: bool = False          # forget what --run has learned: the same network, untrained
    cls: bool = False              # without --run: a ViT's [CLS] token, not the mean of its patches
    labels: float = 1.             # share of the labelled images, of each class
    probes: bool = True            # of every layer, and of the places of the last map
    steps: int = 300               # optimisation steps
    batch_size: int = 64           # images a step, all processes together
    weight_decay: float = .05      # on weights and tokens, not on biases and norms
    decay: float = 1.              # rate of a layer as a share of that of the next deeper one
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


def build(cfg, encoder=None, classes=10):
    vit = dict(pool="cls" if cfg.cls else "mean") if cfg.encoder.startswith("vit") else {}
    return Transfer(encoder or make_encoder(cfg, **vit), classes, cfg.smoothing)


def pretrained(folder, scratch=False):                           # of a finished run -> encoder, its flags
    try:
        result = json.loads(Path(folder, "result.json").expanduser().read_text())
        module = importlib.import_module(result["method"])       # in the folder of this file
        cfg = module.Config(**{k: v for k, v in result["flags"].items() if hasattr(module.Config, k)})
        encoder = module.build(cfg).encoder
        state = read_checkpoint(Path(folder, "encoder.pt").expanduser())
        kept = {k: v for k, v in state.items() if not scratch or k == "centres"}         # iGPT's palette
        encoder.load_state_dict(kept, strict=not scratch)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as e:
        common.fail(f"--run {folder or '(none)'} is no folder of a finished run ({str(e).splitlines()[0]})")
    return encoder.requires_grad_(True), cfg


def by_layer(method, decay, weight_decay):                       # -> parameter groups, each with its scale
    """Layer i of L learns at decay^(L+1-i) of the rate: 0 embedding, L+1 last norm, head, BEiT's biases."""
    where = {}
    for name, p in method.named_parameters():
        m = re.search(r"blocks\.(\d+)\.(?!bias)|layer(\d)\.|(^|encoder\.|s\.0\.)(norm|classifier|bias)", name)
        where[p] = 0 if not m else math.inf if m[4] else int(m[1] or int(m[2]) - 1) + 1
    last = 1 + max(i for i in where.values() if i < math.inf)
    return [dict(params=[p], scale=decay ** (last - min(i, last)), weight_decay=weight_decay * (p.ndim > 1))
            for p, i in where.items()]


def main(cfg):
    torch.manual_seed(cfg.seed)
    if cfg.run and cfg.weights or cfg.optimizer != "adamw":
        common.fail("give --run or --weights, not both, and no --optimizer but adamw")
    encoder, source = pretrained(cfg.run, cfg.scratch) if cfg.run or cfg.scratch else (None, cfg)
    cfg.encoder, cfg.image_size = source.encoder, source.image_size
    cfg.weights = f"{cfg.run}/encoder.pt" * (not cfg.scratch) if cfg.run else cfg.weights
    for k, own in dict(data=source.data or "toys", data_dir=source.data_dir, out=cfg.run or cfg.out).items():
        setattr(cfg, k, own if getattr(cfg, k) == getattr(Config, k) else getattr(cfg, k))     # unless named
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    if data.labels is None:
        common.fail(f"--data {cfg.data} has no labels, without which there is no transfer")
    chosen = some_of_each_class(data.labels, cfg.labels)
    masks = None if data.masks is None else data.masks[chosen]
    data = data._replace(images=data.images[chosen], labels=data.labels[chosen], masks=masks)
    method = build(cfg, encoder, len(data.classes)).to(run.device)
    optimizer = torch.optim.AdamW(by_layer(method, cfg.decay ** bool(cfg.weights), cfg.weight_decay), cfg.lr,
                                  betas=(cfg.momentum, cfg.beta2))
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

    predicted = method.classifier(common.features(method.encoder, data.test_images)).argmax(1)
    result = dict(labelled=len(chosen), accuracy=common.percent(predicted, data.test_labels))
    probes = cfg.probes and hasattr(method.encoder, "layers")
    if probes and masks is not None:
        (told, truth), (before, _) = (segment(lambda x, e=e: e.eval().layers(normalise(x))[-1], data)
                                      for e in (method.encoder, run.untrained))
        result |= dict(miou=class_iou(told, truth), miou_untrained=class_iou(before, truth))
        rows = {name: coloured(y[:10]) for name, y in dict(truth=truth, frozen=before, tuned=told).items()}
        common.save_grid(run.folder / "places.png", {"x": data.test_images[:10]} | rows)
    return run.finish(layers=probes, **result)


if __name__ == "__main__":
    main(parse(Config, PAPER))
