"""DINOSAUR (2023): slots tell the features of a frozen encoder.

Seitzer, Horn, Zadaianchuk, Zietlow, Xiao, Simon-Gabriel, He, Zhang, Schoelkopf, Brox, Locatello. Bridging the
Gap to Real-World Object-Centric Learning. ICLR 2023, arXiv 2209.14860.

    x [B,3,S,S] --ViT (frozen)--> // h [B,N,C] --norm, MLP, T rounds of competition--> slots [B,K,D] (kept)
                                      |                                                   |
                                      '--loss: squares--> features told [B,N,C] <--decoder'--> masks [B,K,N]
    decoder: mlp, each slot alone, mixed by masks; or autoregressive, whose masks are where it looks

Good at: things that its encoder tells apart. Not at: more than that; outlines finer than a patch.

Run      python methods/dinosaur.py
         mBO .45 ± .00 (untrained .13, blocks .22, k-means of h .43), ARI .57 ± .01 (-.03, .04, .54), FG-ARI
         .47 ± .00 (.09, .39, .40); 47 s on 2 cores, after dino.py's own run
Differs  the encoder is dino.py's small ViT of single toys, or --weights; features are told normalised, unless
         --no-norm; mlp has positions in each slot's frame, too (2302.04973), unless --no-relative; a
         cosine, not halving; no flips; AdamW; autoregressive: no bias in attention, a last norm, BOS .02.
"""
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.decoders import MLP, Autoregressive, frames
from kernels.segmentation import blocks, clusters, compare
from kernels.slots import Slots, coloured, complaints, enlarge, monitors
from kernels.views import normalise


@dataclass
class Config(common.Config):
    data: str = "toys:objects=3,jitter=1,small=.5,large=.6,grey,parts=0,n=6000"  # or folder:PATH
    encoder: str = "vit_micro/8"   # a ViT: vit_micro/8, vit_small/8, vit_base ...; see --weights
    pretrain: bool = True          # without --weights: take the one that dino.py has trained, or let it
    times: int = 2                 # the encoder sees the images enlarged so
    steps: int = 2400              # optimisation steps
    batch_size: int = 8            # images a step, all processes together
    clip: float = 1.               # largest norm of the gradient; 0 is any
    k: int = 4                     # number K of slots
    dim: int = 64                  # width D of a slot
    rounds: int = 3                # rounds T of the competition
    decoder: str = "mlp"           # mlp or autoregressive
    norm: bool = True              # tell each patch's features less their mean, over their deviation
    hidden: int = 128              # width of mlp
    relative: bool = True          # mlp's positions count in the slot's frame, too
    depth: int = 1                 # blocks of autoregressive
    heads: int = 4                 # heads of autoregressive


# Official code, COCO: rate 4e-4, warm-up 10,000 of 500,000 steps; DINO's ViT-B/16 through --weights.
PAPER = dict(data="folder:coco", image_size=224, encoder="vit_base/16", times=1, steps=500_000, batch_size=64,
             lr=4e-4, warmup=.02, weight_decay=0., k=7, dim=256, norm=False, hidden=2048, relative=False,
             depth=4, heads=8)


class Dinosaur(nn.Module):
    """encoder: a ViT, which stays as it is. decoder: slots, h, frames -> h told [B,N,C], masks [B,K,N]."""

    def __init__(self, encoder, decoder, k=4, d=64, rounds=3, times=1, norm=False):
        super().__init__()
        self.encoder, self.decoder, self.times, c = encoder.requires_grad_(False), decoder, times, encoder.dim
        self.norm = nn.LayerNorm(c, elementwise_affine=False) if norm else nn.Identity()
        self.mlp = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, d))
        self.slots = Slots(k, d, d, rounds, 4 * d)

    @torch.no_grad()
    def features(self, x):                                       # [B,3,S,S] -> [B,N,C], of the last block
        encoder, x = self.encoder.eval(), F.interpolate(x, scale_factor=self.times, mode="bilinear")
        return self.norm(encoder.blocks(encoder.prepend(encoder.embed(x)))[:, encoder.prefix:].float())

    def parts(self, x):                                # -> target, told [B,N,C], masks, attention [B,K,N]
        h = self.features(x)
        s, a = self.slots(self.mlp(h))                           # [B,K,D], [T,B,K,N]
        told, masks = self.decoder(s, h, frame=frames(a[-1]))
        self.s = s.flatten(0, 1)                                 # [BK,D]
        return h, told.float(), masks, a[-1]

    def forward(self, v):                                        # [B,3,S,S] -> loss
        h, told, self.masks, _ = self.parts(v)
        return F.mse_loss(told, h)


def build(cfg):
    encoder = make_encoder(cfg, pool="cls")                      # an option of ViTs alone
    n, c = (cfg.image_size * cfg.times // encoder.patch) ** 2, encoder.dim
    decoders = dict(mlp=lambda: MLP(cfg.dim, c, n, cfg.hidden, cfg.relative),
                    autoregressive=lambda: Autoregressive(cfg.dim, c, n, cfg.depth, cfg.heads))
    if cfg.decoder not in decoders or c % cfg.heads:
        common.fail(f"--decoder {cfg.decoder}: give mlp or autoregressive, with --heads that divide {c}")
    return Dinosaur(encoder, decoders[cfg.decoder](), cfg.k, cfg.dim, cfg.rounds, cfg.times, cfg.norm)


def pretrained(cfg):                                             # -> the file with the encoder's weights
    file = Path(cfg.out).expanduser() / f"dino-toys-grey-seed{cfg.seed}/encoder.pt"
    if not (own := cfg.encoder == Config.encoder) or not file.exists():
        cmd = [sys.executable, Path(__file__).with_name("dino.py")]
        cmd += [f"--{key}={getattr(cfg, key)}" for key in ("seed", "out", "device")]
        if not own or common.world() > 1 or subprocess.run(cmd, check=False).returncode:
            common.fail(f"dino.py has trained no {cfg.encoder}: give it by --weights" + ", or run it" * own)
    return str(file)


@torch.no_grad()
def segment(method, images):                                     # uint8 [n,3,S,S] -> masks, a [n,K,S,S]
    parts = [method.eval().parts(normalise(x))[2:] for x in images.split(100)]
    return [enlarge(torch.cat(y), images.shape[3]) for y in zip(*parts, strict=True)]


def main(cfg):
    run = Run(cfg, __file__)
    data, weights = load_data(cfg, run.device), cfg.weights or (pretrained(cfg) if cfg.pretrain else "")
    method = build(replace(cfg, weights=weights)).to(run.device)
    optimizer = make_optimizer(cfg, method)
    test = data.test_images[:500]
    h, (before, _) = method.features(normalise(test)), segment(method, test)     # [500,N,C], [500,K,S,S]
    model = run.start(method.train(), data, {"mean feature": h.var(0).mean().item()}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,S,S] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        with run.autocast():
            loss = model(normalise(x))
        optimizer.zero_grad()
        run.finite(loss).backward()
        nn.utils.clip_grad_norm_(method.parameters(), cfg.clip or float("inf"))
        optimizer.step()
        run.log(loss, slots=method.s, **monitors(method.masks))

    masks, a = segment(method, test)
    rows = {f"slot {i + 1}": y[:10, None].expand(-1, 3, -1, -1) for i, y in enumerate(masks.unbind(1))}
    rows |= {name: coloured(y[:10].argmax(1)) for name, y in (("masks", masks), ("attention", a))}
    common.save_grid(run.folder / "slots.png", {"x": test[:10]} | rows)
    for text in complaints(masks):
        run.print(f"WARNING: {text}")
    found = {"masks": masks, "attention": a, "untrained": before, "blocks": blocks(cfg.k, test.shape[3]),
             "k-means": enlarge(clusters(h, cfg.k), test.shape[3])}
    return run.finish(**compare(found, data.test_masks, int(h.shape[1] ** .5)))


if __name__ == "__main__":
    main(parse(Config, PAPER))
