"""BEiT (2021): tell the visual words of hidden patches.

A discrete autoencoder (dVAE) is trained first, then frozen: the tokenizer. It has K words for patches, and a
transformer that sees an image without some blocks of patches tells theirs.

Bao, Dong, Piao, Wei. BEiT: BERT Pre-Training of Image Transformers. ICLR 2022, arXiv 2106.08254. The dVAE:
Ramesh et al. Zero-Shot Text-to-Image Generation. ICML 2021, arXiv 2102.12092.

    1.  x [B,3,H,W] --tokenizer--> logits [B,N,K] --Gumbel-softmax--> words [B,N,E] --decoder--> [B,6,H,W]
                                                                              of each pixel: mean, log scale
    2.  v [B,3,H,W] --tokenizer, argmax--> // word of each patch [B,N] <-----------------loss, where hidden
         '--hidden patches: a mask token--> encoder (kept) --> [B,1+N,D] --linear--> [B,N,K]

Good at: pre-training for fine-tuning; no texture to paint. Not at: what the tokenizer does not tell apart.

Run      python methods/beit.py
         linear 29.0 ± 1.6 % (untrained 13.7; each seed at least +13), k-NN 22.2 ± 3.1 (11.7); 66 s on 2 cores
Differs  a small dVAE of this file and of the same data, for DALL-E's, which sees pixels as they are; no
         stochastic depth; the keys' bias, which softmax cancels, stays; no jitter of colours; [CLS] decays,
         the tokenizer as much as the rest; the rate ends at 0, not 1e-5; bilinear crops; ImageNet's mean and
         deviation, not .5; the probe sees the mean of the patches.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_encoder, make_optimizer, parse, set_lr
from kernels.masks import block_mask
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    encoder: str = "vit_micro"     # a ViT: vit_micro, vit_tiny, vit_small, vit_base, vit_large
    steps: int = 500               # optimisation steps of the second stage
    batch_size: int = 32           # images a step, all processes together
    lr: float = 4e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    weight_decay: float = .05      # on weights and tokens, not on biases and norms
    clip: float = 3.               # largest norm of the gradient; 0 is any
    first: float = 1.3             # steps of the first stage, the tokenizer, as a share of the second's
    lr_first: float = 1e-2         # peak learning rate of the first stage
    k: int = 256                   # number K of visual words
    words_dim: int = 64            # width E of a word, and of the tokenizer's layers
    beta: float = 2.               # weight of KL(words || uniform), a patch, after a fifth of stage 1
    tau: float = .1                # temperature of the Gumbel-softmax at the end of stage 1; starts at 1
    mask_ratio: float = .4         # share of the patches that is hidden, at most
    least: int = 4                 # smallest area of a block, in patches
    crop: float = .5               # smallest share of the image's area in a view


# Official code for ViT-B, 800 epochs on ImageNet-1k: at most 75 of 196 patches hidden. The tokenizer's rate,
# beta and tau: 2102.12092.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="vit_base/16", epochs=800, batch_size=2048,
             lr=1.5e-3, warmup=.0125, lr_first=1e-4, k=8192, words_dim=128, beta=6.6, tau=1 / 16,
             mask_ratio=75 / 196, least=16, crop=.08)


def draw_masks(cfg, n, side, device):                            # -> bool [n,N], True = hidden
    rng = np.random.default_rng(torch.randint(2 ** 31, ()).item())
    masks = [block_mask(side, round(cfg.mask_ratio * side ** 2), cfg.least, rng) for _ in range(n)]
    return torch.stack(masks).flatten(1).to(device)


class Residual(nn.Sequential):
    def __init__(self, c):
        super().__init__(nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(), nn.Conv2d(c, c, 1))

    def forward(self, x):                                        # [B,C,h,w]
        return x + super().forward(x)


class DVAE(nn.Module):
    """Images [B,3,H,W] in 0..1 -> one of k words for each patch of p x p pixels, and back."""

    def __init__(self, k, p, dim=64, eps=.1):
        super().__init__()
        self.k, self.eps, self.words = k, eps, nn.Parameter(torch.randn(k, dim))         # [K,E]
        self.encoder = nn.Sequential(nn.Conv2d(3, dim, p, p), Residual(dim), nn.ReLU(), nn.Conv2d(dim, k, 1))
        self.decoder = nn.Sequential(Residual(dim), nn.ConvTranspose2d(dim, 6, p, p))

    def tokens(self, x):                                         # [B,3,H,W] -> [B,N], the likeliest words
        return self.encoder(x).flatten(2).argmax(1)

    def decode(self, weights):                                   # of the words, [B,K,h,w] -> [B,3,H,W] twice
        return self.decoder(torch.einsum("bkhw,ke->behw", weights, self.words)).chunk(2, 1)

    def paint(self, tokens, h):                                  # [B,N] -> [B,3,H,W]
        one_hot = rearrange(F.one_hot(tokens, self.k).float(), "b (h w) k -> b k h w", h=h)
        return ((self.decode(one_hot)[0].sigmoid() - self.eps) / (1 - 2 * self.eps)).clamp(0, 1)

    def forward(self, x, tau, beta):                             # [B,3,H,W] -> loss
        """-log p of the pixels' values, their mean + beta KL(q || uniform) a patch, shared by its values."""
        logits = self.encoder(x)                                 # [B,K,h,w]
        gumbel = -torch.empty_like(logits).exponential_().clamp_min(1e-9).log()
        mu, ln_b = self.decode(((logits + gumbel) / tau).softmax(1))     # soft, [B,3,H,W] each
        x = (1 - 2 * self.eps) * x + self.eps                    # logit-Laplace has no 0 and no 1
        nll = (x.logit() - mu).abs() / ln_b.exp() + ln_b + (2 * x * (1 - x)).log()
        log_q = logits.log_softmax(1)
        kl = math.log(self.k) + (log_q.exp() * log_q).sum(1).mean()      # from q to uniform
        self.perplexity = torch.special.entr(log_q.exp().mean((0, 2, 3))).sum().exp()    # words in use
        return nll.mean() + beta * kl * logits[0, 0].numel() / x[0].numel()


class RelativeBias(nn.Module):
    """What a head adds to a logit: a number for each offset between two patches, and three for [CLS]."""

    def __init__(self, side, heads):
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        place = torch.cartesian_prod(torch.arange(side), torch.arange(side))     # [N,2]
        offset = place[:, None] - place + side - 1               # [N,N,2], from 0
        index = F.pad(offset[..., 0] * (2 * side - 1) + offset[..., 1], (1, 0, 1, 0))    # [1+N,1+N]
        index[0], index[:, 0], index[0, 0] = (len(self.table) - i for i in (3, 2, 1))
        self.register_buffer("index", index)

    def forward(self):                                           # -> [heads,1+N,1+N]
        return self.table[self.index].permute(2, 0, 1)


class RelativeBlock(nn.Module):
    """A ViT's block with relative positions and layer scale. layer: 1 is the first; deep ones start small."""

    def __init__(self, block, bias, layer, gamma=.1):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.bias, dim = bias, len(block.norm1.weight)           # one bias for all blocks
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), gamma)) for _ in range(2))
        for w in (self.attn.proj.weight, self.mlp.fc2.weight):
            w.data /= (2 * layer) ** .5

    def forward(self, x):                                        # [B,1+N,D]
        q, k, v = self.attn.split(self.norm1(x))
        a = F.scaled_dot_product_attention(q, k, v, self.bias()[None].to(q.dtype))
        x = x + self.gamma_1 * self.attn.proj(rearrange(a, "b h n d -> b n (h d)"))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class BEiT(nn.Module):
    """encoder: a ViT with embed, encode, blocks, .dim, .patch, .pos_embed, which gets relative positions,
    and so starts again. tokenizer: has .tokens(images [B,3,H,W] in 0..1) -> [B,N], of .k words."""

    def __init__(self, encoder, tokenizer):
        super().__init__()
        self.side = math.isqrt(encoder.pos_embed.shape[1] - 1)
        bias = RelativeBias(self.side, encoder.blocks[0].attn.heads)
        encoder.pos_embed.requires_grad_(False).zero_()
        encoder.blocks = nn.Sequential(*[RelativeBlock(b, bias, i) for i, b in enumerate(encoder.blocks, 1)])
        self.encoder, self.tokenizer = encoder, tokenizer.requires_grad_(False)
        self.mask_token = nn.Parameter(torch.randn(1, 1, encoder.dim) * .02)
        self.classifier = nn.Linear(encoder.dim, tokenizer.k)

    def predict(self, v, mask):                                  # [B,3,H,W], bool [B,N] -> [B,N,D]
        return self.encoder.encode(self.encoder.embed(v, mask, self.mask_token))[:, self.encoder.prefix:]

    def forward(self, v, mask):                                  # [B,3,H,W], bool [B,N] -> loss
        tokens, h = self.tokenizer.tokens(denormalise(v)), self.predict(v, mask)         # [B,N], [B,N,D]
        logits, self.h = self.classifier(h[mask]), h.mean(1)     # [M,K], [B,D]
        self.accuracy = (logits.argmax(1) == tokens[mask]).float().mean()
        return F.cross_entropy(logits, tokens[mask])             # hidden only


def build(cfg):
    if cfg.weights:
        common.fail("--weights does not fit: this encoder gets relative positions and starts anew")
    encoder = make_encoder(cfg, pool="mean")
    if round(cfg.mask_ratio * (cfg.image_size // encoder.patch) ** 2) < 1:
        common.fail(f"--mask_ratio {cfg.mask_ratio} hides no patch: give more, or smaller patches")
    return BEiT(encoder, DVAE(cfg.k, encoder.patch, cfg.words_dim))


def first_stage(cfg, run, images):                               # -> a tokenizer, each process its own
    steps, dvae = math.ceil(cfg.first * run.total), build(cfg).tokenizer.requires_grad_(True).to(run.device)
    optimizer = make_optimizer(cfg, dvae)
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, cfg.lr_first, warmup=cfg.warmup))
        x = images[torch.randint(len(images), (cfg.batch_size,))]        # [B,3,H,W]
        v = denormalise(views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0))
        loss = dvae(v, cosine(step, steps, 1., cfg.tau), cfg.beta * min(1, 5 * step / steps))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dvae.parameters(), cfg.clip or float("inf"))
        optimizer.step()
    if not loss.isfinite():
        common.fail(f"the tokenizer's loss is {loss}: lower --lr_first")
    run.print(f"tokenizer: {steps} steps, loss {loss:.3f}, {dvae.perplexity:.0f} words in use (perplexity)")
    return dvae


@torch.no_grad()
def report(method, x, mask):                                     # [n,3,H,W] in 0..1, bool [n,N]
    """Rows of images; hidden words told, the commonest word, words in use, pixels' variance in the words."""
    tokens, h = method.tokenizer.tokens(x), x.shape[2] // method.encoder.patch           # [n,N]
    told = method.classifier(method.predict(normalise(x), mask)).argmax(-1)
    seen = F.interpolate(rearrange(1. - mask.float(), "n (h w) -> n 1 h w", h=h), x.shape[2:])
    whole = method.tokenizer.paint(tokens, h)                    # [n,3,H,W]
    rows = {"seen": x * seen + .5 * (1 - seen), "hidden words told":
            method.tokenizer.paint(torch.where(mask, told, tokens), h), "all words": whole, "x": x}
    share = tokens.flatten().bincount(minlength=method.tokenizer.k) / tokens.numel()     # [K]
    return {name: y[:10] for name, y in rows.items()}, dict(
        words_told=(told == tokens)[mask].float().mean().item(), commonest_word=share.max().item(),
        words_in_use=torch.special.entr(share).sum().exp().item(),
        variance_carried=1 - ((whole - x).square().mean() / x.var((0, 2, 3)).mean()).item())


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {f"ln {cfg.k}": math.log(cfg.k)}, optimizer)
    if not run.first:                                            # a resumed run has its tokenizer
        began = time.perf_counter()
        state = first_stage(cfg, run, data.images).state_dict()
        state = {k: common.gather(v[None])[0] for k, v in state.items()}         # of the first process
        method.tokenizer.load_state_dict(state)
        run.seconds = time.perf_counter() - began

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=(cfg.crop, 1.), p_jitter=0, grey=0)
        mask = draw_masks(cfg, len(v), method.side, run.device)  # [B,N]
        with run.autocast():
            loss = model(v, mask)
        optimizer.zero_grad()
        run.finite(loss).backward()
        nn.utils.clip_grad_norm_(method.parameters(), cfg.clip or float("inf"))
        optimizer.step()
        run.log(loss, h=method.h, accuracy=method.accuracy)

    x = data.test_images[:500].float() / 255
    rows, scores = report(method.eval(), x, draw_masks(cfg, len(x), method.side, run.device))
    common.save_grid(run.folder / "words.png", rows)
    return run.finish(**scores)


if __name__ == "__main__":
    main(parse(Config, PAPER))
