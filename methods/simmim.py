"""SimMIM (2022): paint hidden squares, with one linear layer.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu. SimMIM: A Simple Framework for Masked Image Modeling. CVPR 2022,
arXiv 2111.09886.

    x [B,3,H,W] --patches--> [B,N,D] --squares of 2 x 2: a mask token--> [B,N,D] --positions, encoder (kept)
         |                                                                                |
         '---> pixels of the hidden patches [B,N,P] <--L1 loss-- [B,N,P] <--linear-- [B,1+N,D]

Good at: simplicity; any encoder will do, for it sees the mask tokens. Not at: speed, all patches pass it;
features for k-NN as they are. Squares of one patch would be too easy: the neighbours tell them.

Run      python methods/simmim.py
         linear 30.4 ± 0.6 % (untrained 18.2; each seed at least +11), k-NN 14.9 ± 0.6 (12.2); 59 s on 2 cores
Differs  learned positions, for a bias by relative position; they, [CLS] and mask token decay; the keys' bias,
         which softmax cancels, stays; no layer scale, no stochastic depth, no smaller start of deep layers;
         the rate follows a cosine, as for Swin; the probe sees the mean of the patches.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    encoder: str = "vit_micro"     # a ViT: vit_micro, vit_tiny, vit_small, vit_base, vit_large
    steps: int = 600               # optimisation steps
    batch_size: int = 32           # images a step, all processes together
    weight_decay: float = .05      # on weights and tokens, not on biases and norms
    clip: float = 5.               # largest norm of the gradient; 0 is any
    mask_ratio: float = .6         # share of the squares that is hidden
    square: int = 8                # side of a square in pixels
    crop: float = .67              # smallest share of the image's area in a view


# Official code for ViT-B: rate 1e-4 x B/512, warm-up 10 of 800 epochs.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="vit_base/16", epochs=800, batch_size=2048,
             lr=4e-4, warmup=.0125, square=32)


def patchify(x, p):                                              # [B,3,H,W] -> [B,N,P], channel last
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(t, p, height):                                    # [B,N,P] -> [B,3,H,W]
    return rearrange(t, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=height // p)


def random_squares(b, side, times, ratio, device):
    """mask [B,N], True = hidden: of the squares of times x times patches, the share `ratio`, rounded up."""
    n = (side // times) ** 2
    hidden = torch.rand(b, n, device=device).argsort(1) < -int(-ratio * n // 1)          # [B,n]
    mask = rearrange(hidden, "b (h w) -> b h w", h=side // times)
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)


class SimMIM(nn.Module):
    """encoder: a ViT with embed(x, mask, mask_token), encode(tokens), .dim, .patch, .prefix."""

    def __init__(self, encoder, times=2, mask_ratio=.6):
        super().__init__()
        self.encoder, self.p, self.times, self.mask_ratio = encoder, encoder.patch, times, mask_ratio
        self.mask_token = nn.Parameter(torch.randn(1, 1, encoder.dim) * .02)
        self.head = nn.Linear(encoder.dim, 3 * self.p ** 2)

    def reconstruct(self, v):                                    # [B,3,H,W] -> prediction [B,N,P], mask [B,N]
        mask = random_squares(len(v), v.shape[2] // self.p, self.times, self.mask_ratio, v.device)
        h = self.encoder.encode(self.encoder.embed(v, mask, self.mask_token))[:, self.encoder.prefix:]
        self.h = h.mean(1)                                       # [B,D]
        return self.head(h), mask

    def forward(self, v):                                        # [B,3,H,W] -> loss
        prediction, mask = self.reconstruct(v)
        return (prediction.float() - patchify(v, self.p)).abs()[mask].mean()     # hidden only


def build(cfg):
    encoder = make_encoder(cfg, pool="mean")
    if cfg.square % encoder.patch or cfg.image_size % cfg.square:
        common.fail(f"--square {cfg.square}: give a multiple of {encoder.patch}, a part of {cfg.image_size}")
    return SimMIM(encoder, cfg.square // encoder.patch, cfg.mask_ratio)


@torch.no_grad()
def painted(method, x):                                          # uint8 [n,3,H,W] -> rows of images
    x = normalise(x)
    t, mask = method.eval().reconstruct(x)
    patches, hidden = patchify(x, method.p), mask[..., None]
    rows = {"seen": patches.masked_fill(hidden, 0), "painted": t.float().where(hidden, patches), "x": patches}
    return {name: denormalise(unpatchify(y, method.p, x.shape[2])) for name, y in rows.items()}


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    some = normalise(data.images[:2000])
    mean_colour = (some - some.mean((0, 2, 3), keepdim=True)).abs().mean().item()
    model = run.start(method, data, {"mean colour": mean_colour}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        nn.utils.clip_grad_norm_(method.parameters(), cfg.clip or float("inf"))
        optimizer.step()
        run.log(loss, h=method.h)

    common.save_grid(run.folder / "reconstructions.png", painted(method, data.test_images[:10]))
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
