"""Slot Attention (2020): slots compete for pixels, each paints its own.

Locatello, Weissenborn, Unterthiner, Mahendran, Heigold, Uszkoreit, Dosovitskiy, Kipf. Object-Centric Learning
with Slot Attention. NeurIPS 2020, arXiv 2006.15055.

    x [B,3,S,S] --encoder--> [B,C,h,h] --+ places, norm, MLP--> [B,N,C] --T rounds--> slots [B,K,D] (kept)
      |                                                                             each alone, on a grid |
      '--loss: squares--> sum of masks x rgb [B,3,S,S] <--softmax over K-- [B,K,4,S,S] <--decoder---------'

Good at: parting scenes of things of one colour on plain ground, without a label. Not at: textures, where
colour tells no things apart; leaving a slot empty: one that is to spare shares a toy with another.

Run      python methods/slot_attention.py
         ARI .59 ± .04 (untrained -.02; four equal blocks .02), mBO .44 ± .02 (.09; .16), FG-ARI .53 ± .02
         (.12; .46), of the attention .57 ± .02, each seed above both; 49 s on 2 cores
Differs  the decoder's positions count from the mean of each slot's attention, in its standard deviations, as
         Invariant Slot Attention's (Biza et al., ICML 2023, arXiv 2302.04973); --no-relative counts from the
         image's middle (paper: its sides). Squares and products of positions enter, the encoder's too; pixels
         have ImageNet's mean and deviation, views are mirrored; a cosine for a halving rate; a linear layer,
         a ReLU before the decoder; quick: clipped gradients, two convolutions, a 1 x 1 decoder of 16 x 16.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_optimizer, parse, set_lr
from kernels.decoders import Broadcast, axes, frames, quadratic
from kernels.encoders import Convolutions
from kernels.segmentation import blocks, compare
from kernels.slots import Slots, coloured, complaints, enlarge, glorot, monitors
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    data: str = "toys:objects=3,jitter=1,small=.4,grey,parts=0"  # toys of two objects and more
    encoder: str = "convolutions"  # the only choice: see width, kernel, stride
    steps: int = 4000              # optimisation steps
    batch_size: int = 8            # images a step, all processes together
    lr: float = 2e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    weight_decay: float = 0.       # on weights and tokens, not on biases and norms
    clip: float = 1.               # largest norm of the gradient; 0 is any
    k: int = 4                     # number K of slots
    dim: int = 32                  # width D of a slot
    rounds: int = 3                # rounds T of the competition
    width: int = 32                # channels of encoder and decoder
    kernel: int = 5                # side of the encoder's convolutions
    depth: int = 2                 # how many
    stride: int = 2                # of the first of them
    grid: int = 16                 # side of the decoder's grid
    up: int = 0                    # its deconvolutions of 5 x 5, stride 2; without, 1 x 1 and enlarged
    relative: bool = True          # the decoder's positions are in the slot's frame
    queries: bool = False          # slots start from a learned vector each, not from one Gaussian


# Official code, CLEVR6: warm-up 10,000 steps. Give scenes of 6 things at most, cropped to [29:221, 64:256].
PAPER = dict(data="folder:clevr", image_size=128, steps=500_000, batch_size=64, lr=4e-4, warmup=.02, clip=0.,
             k=7, width=64, dim=64, depth=4, stride=1, grid=8, up=4, relative=False)


class SlotAttention(nn.Module):
    """encoder: has .dim and .layers(images [B,3,S,S]), a list of maps, the last [B,dim,h,h]."""

    def __init__(self, encoder, decoder, k=4, d=64, rounds=3, relative=True, queries=False):
        super().__init__()
        c = encoder.dim
        self.encoder, self.decoder, self.relative, self.place = encoder, decoder, relative, nn.Linear(5, c)
        self.mlp = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c))
        self.slots = Slots(k, c, d, rounds, init="queries" if queries else "gaussian", bilevel=False)
        glorot(self)

    def parts(self, x):                      # [B,3,S,S] -> rgb [B,K,3,S,S], masks [B,K,1,S,S], a [T,B,K,N]
        h = self.encoder.layers(x)[-1]                           # [B,C,h,h]
        s, a = self.slots(self.mlp(h.flatten(2).mT + self.place(quadratic(axes(h.shape[2]).to(h.device)))))
        frame = frames(a[-1]) if self.relative else (s.new_zeros(1, 1, 2), s.new_ones(1, 1, 2))
        out = self.decoder(s, *frame).float()                    # [B,K,4,S,S]
        self.s = s.flatten(0, 1)                                 # [BK,D]
        return out[:, :, :3], out[:, :, 3:].softmax(1), a

    def forward(self, v):                                        # [B,3,S,S] -> loss
        rgb, masks, _ = self.parts(v)
        self.masks = masks.detach()[:, :, 0]                     # [B,K,S,S]
        return F.mse_loss((masks * rgb).sum(1), v)


def build(cfg):
    if cfg.encoder != Config.encoder:
        common.fail(f"--encoder {cfg.encoder} does not fit: convolutions alone, see --width and --depth")
    if cfg.weights:
        common.fail("--weights does not fit: no file is known for this encoder")
    decoder = Broadcast(cfg.dim, cfg.width, cfg.grid, cfg.up, cfg.image_size)
    encoder = Convolutions(cfg.width, cfg.kernel, cfg.stride, cfg.depth)
    return SlotAttention(encoder, decoder, cfg.k, cfg.dim, cfg.rounds, cfg.relative, cfg.queries)


@torch.no_grad()
def segment(method, images):                                     # uint8 [n,3,S,S] -> masks, a [n,K,S,S]
    out = [method.eval().parts(normalise(x))[1:] for x in images.split(100)]
    a = enlarge(torch.cat([a[-1] for _, a in out]), images.shape[3])
    return torch.cat([m[:, :, 0] for m, _ in out]), a


@torch.no_grad()
def picture(method, images):
    rgb, masks, a = method.eval().parts(normalise(images))
    whole, size, k = denormalise((masks * rgb).sum(1)), images.shape[3], masks.shape[1]
    rows = {"x": images, "painted": whole}
    rows |= {f"slot {i + 1}": masks[:, i] * denormalise(rgb[:, i]) + 1 - masks[:, i] for i in range(k)}
    rows |= {f"attention, round {t}": coloured(enlarge(y, size).argmax(1)) for t, y in enumerate(a, 1)}
    return rows | {"masks": coloured(masks[:, :, 0].argmax(1))}


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    test = data.test_images[:500]
    before, spread = segment(method, test)[0], normalise(test).var((0, 2, 3)).mean().item()
    model = run.start(method.train(), data, {"mean colour": spread}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,S,S] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=None, p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        nn.utils.clip_grad_norm_(method.parameters(), cfg.clip or float("inf"))
        optimizer.step()
        run.log(loss, slots=method.s, **monitors(method.masks))

    common.save_grid(run.folder / "slots.png", picture(method, test[:10]))
    masks, a = segment(method, test)
    for text in complaints(masks):
        run.print(f"WARNING: {text}")
    found = dict(masks=masks, attention=a, untrained=before, blocks=blocks(cfg.k, test.shape[3]))
    return run.finish(**compare(found, data.test_masks, test.shape[3] // cfg.stride))


if __name__ == "__main__":
    main(parse(Config, PAPER))
