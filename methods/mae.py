"""MAE (2022): paint hidden patches from the visible quarter.

He, Chen, Xie, Li et al. Masked Autoencoders Are Scalable Vision Learners. CVPR 2022, arXiv 2111.06377.

    x [B,3,H,W] --patches, positions--> [B,N,D] --keep 25%--> [B,N/4,D] --encoder (kept)--> [B,1+N/4,D]
         |                                                    + mask tokens, unshuffle, positions  |
         '--> pixels of the hidden patches [B,N,P] <--loss-- [B,N,P] <-- decoder <----------------'

Good at: pre-training transformers for fine-tuning, at low cost. Not at: k-NN; its features are for painting.

Run      python methods/mae.py
         linear 44.2 ± 1.9 % (untrained 29.1; each seed at least +13), k-NN 30.6 ± 3.9 (15.0); 63 s on 2 cores
Differs  the probe sees the mean of patches; bilinear crops; the quick run's are larger, its patches 4 pixels.
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
from kernels.encoders import ViTBlock, sincos_positions
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    encoder: str = "vit_micro"     # a ViT: vit_micro, vit_tiny, vit_small, vit_base, vit_large
    steps: int = 700               # optimisation steps
    batch_size: int = 64           # images a step, all processes together
    beta2: float = .95             # beta2 of adamw
    weight_decay: float = .05      # on weights and tokens, not on biases and norms
    mask_ratio: float = .75        # share of the patches that is hidden
    decoder_dim: int = 64          # width of the decoder
    decoder_depth: int = 2         # blocks of the decoder
    decoder_heads: int = 4         # heads of the decoder
    crop: float = .5               # smallest share of the image's area in a view


# Official code: rate 1.5e-4 x B/256, warm-up 40 of 800 epochs.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="vit_large/16", epochs=800, batch_size=4096,
             lr=2.4e-3, warmup=.05, decoder_dim=512, decoder_depth=8, decoder_heads=16, crop=.2)


def patchify(x, p):                                              # [B,3,H,W] -> [B,N,P], channel last
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(t, p, height):                                    # [B,N,P] -> [B,3,H,W]
    return rearrange(t, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=height // p)


def random_mask(b, n, ratio, device):
    """mask [B,N], True = hidden; keep [B,N'], the kept patches; restore [B,N], from shuffled to in order."""
    order, n_keep = torch.rand(b, n, device=device).argsort(1), int(n * (1 - ratio))     # [B,N], N'
    restore = order.argsort(1)                                   # [B,N], patch i is at restore[i]
    return restore >= n_keep, order[:, :n_keep], restore


def patch_statistics(x):                                         # [B,N,P] -> mean, std [B,N,1]
    return x.mean(-1, keepdim=True), (x.var(-1, keepdim=True) + 1e-6).sqrt()


class MAE(nn.Module):
    """encoder: a ViT with embed(x), encode(tokens), .dim, .patch, .prefix, .pos_embed; anew: drawn again."""

    def __init__(self, encoder, mask_ratio=.75, dim=64, depth=2, heads=4, anew=False):
        super().__init__()
        self.encoder, self.p, self.mask_ratio = encoder, encoder.patch, mask_ratio
        side = int((encoder.pos_embed.shape[1] - 1) ** .5)
        self.project = nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * .02)
        self.register_buffer("positions", sincos_positions(dim, side, side)[None])  # [1,N,D']
        self.decoder = nn.Sequential(*[ViTBlock(dim, heads) for _ in range(depth)],
                                     nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 3 * self.p ** 2))
        parts = [encoder] * anew + [self.project, self.decoder]
        for m in (m for part in parts for m in part.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
        if anew:                                                 # as one matrix
            nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))

    def reconstruct(self, v):                                    # [B,3,H,W] -> prediction [B,N,P], mask [B,N]
        tokens = self.encoder.embed(v)                           # [B,N,D]
        mask, keep, restore = random_mask(*tokens.shape[:2], self.mask_ratio, v.device)
        kept = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))  # [B,N',D]
        h = self.encoder.encode(kept)                            # [B,1+R+N',D]
        self.h, t = h[:, self.encoder.prefix:].mean(1), self.project(h)  # [B,D], [B,1+R+N',D']
        first, t = t[:, :self.encoder.prefix], t[:, self.encoder.prefix:]
        hidden = self.mask_token.expand(len(t), mask.shape[1] - t.shape[1], -1)  # [B,N-N',D']
        t = torch.cat([t, hidden.to(t.dtype)], 1).gather(1, restore[..., None].expand(-1, -1, t.shape[2]))
        t = self.decoder(torch.cat([first, t + self.positions], 1))      # [B,1+R+N,P]
        return t[:, self.encoder.prefix:], mask

    def forward(self, v):                                        # [B,3,H,W] -> loss
        prediction, mask = self.reconstruct(v)
        target = patchify(v, self.p)                             # [B,N,P]
        mean, std = patch_statistics(target)
        return (prediction.float() - (target - mean) / std).square().mean(-1)[mask].mean()       # hidden only


def build(cfg):
    encoder, anew = make_encoder(cfg, positions="sincos", pool="mean"), not cfg.weights
    return MAE(encoder, cfg.mask_ratio, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads, anew)


@torch.no_grad()
def painted(method, x, ratio):
    """Masked, painted, original. A hidden patch's true mean and contrast are put back: read shapes."""
    x, method.mask_ratio = normalise(x), ratio
    t, mask = method.eval().reconstruct(x)
    patches, hidden = patchify(x, method.p), mask[..., None]
    mean, std = patch_statistics(patches)
    grey, paint = patches.masked_fill(hidden, 0), (t.float() * std + mean).where(hidden, patches)
    return [denormalise(unpatchify(y, method.p, x.shape[2])) for y in (grey, paint, patches)]


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {"patch mean, (P-1)/P": 1 - 1 / (3 * method.p ** 2)}, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h)

    rows = {}
    for ratio in (.75, .85, .95):
        grey, paint, x = painted(method, data.test_images[:10], ratio)
        rows |= {f"{ratio:.0%} hidden": grey, f"{ratio:.0%} painted": paint}
    common.save_grid(run.folder / "reconstructions.png", rows | {"original": x})
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
