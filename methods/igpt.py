"""iGPT (2020): a GPT whose words are pixels.

Chen, Radford, Child, Wu, Jun, Luan, Sutskever. Generative Pretraining from Pixels. ICML 2020.
--objective bert tells hidden pixels instead, as Devlin et al. 2018, arXiv 1810.04805, words.

    x [B,3,H,W] --nearest of K colours--> tokens [B,N] --[sos], all but the last--> [B,N,D] + positions
                                             |                        | blocks: each sees what is before it
                                             |                    '--> a layer (kept) --mean--> [B,D]
                                             '---- targets <--loss-- logits [B,N,K] <-- the last

Good at: completing images, with no idea of their two dimensions. Not at: large images; attention costs N^2.
The features are a middle layer's, for the last is about the next pixel; so short a run has not come to that.

Run      python methods/igpt.py
         1.25 ± .02 nats a token (histogram 4.03); 55 s on 2 cores
         linear 20.7 ± 1.9 % (untrained 13.1; each seed at least +4), k-NN 16.7 ± 1.9 (12.1)
Differs  images are only flipped; an MLP's weights start by its width, as attention's do (the code: .02);
         the quick run is small: 12 x 12 pixels, 64 colours, of this data.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.cluster.vq import kmeans2
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # run from any folder, without an install
import common
from common import Run, cosine, load_data, make_optimizer, parse, set_lr
from kernels.evaluation import histogram_nats
from kernels.views import denormalise, normalise, views


@dataclass
class Config(common.Config):
    data: str = "toys:n=6000,noise=0"  # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    image_size: int = 12           # side of the images in pixels
    encoder: str = "gpt"           # a GPT-2, the only choice: see width, depth, heads
    objective: str = "ar"          # ar: the next token; bert: hidden tokens from all others
    steps: int = 800               # optimisation steps
    batch_size: int = 16           # images a step, all processes together
    lr: float = 3e-3               # peak learning rate: linear warm-up, then half a cosine to 0
    beta2: float = .95             # beta2 of adamw
    weight_decay: float = 0.       # on weights and tokens, not on norms
    k: int = 64                    # colours, by k-means
    hide: float = .15              # share of the tokens that bert hides
    width: int = 64                # D
    depth: int = 6                 # blocks
    heads: int = 2                 # heads of a block
    layer: int = 4                 # the block whose mean is the feature


# iGPT-S, the text; its warm-up is one epoch. The official code's number of heads. The layer: the middle one.
PAPER = dict(data="folder:imagenet", image_size=32, steps=1_000_000, batch_size=128, warmup=.01, k=512,
             width=512, depth=24, heads=8, layer=12)


class Block(nn.Module):
    """GPT-2's, but no biases, RMS norms, and smaller weights on the way out in a deeper network."""

    def __init__(self, dim, heads, depth, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        for m, layers in ((self.qkv, 1), (self.fc1, 1), (self.proj, depth), (self.fc2, depth)):
            nn.init.normal_(m.weight, std=(m.in_features * layers) ** -.5)

    def forward(self, x):                                        # [B,N,D]
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (t h d) -> t b h n d", t=3, h=self.heads)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)       # [B,h,N,d]
        x = x + self.proj(rearrange(a, "b h n d -> b n (h d)"))
        u = self.fc1(self.norm2(x))                              # [B,N,4D]
        return x + self.fc2(u * (1.702 * u).sigmoid())


class GPT(nn.Module):
    """Images -> tokens -> the output of each block. centres [K,3] in [-1,1] must be set."""

    def __init__(self, k, size, width, depth, heads, layer, causal):
        super().__init__()
        self.dim, self.size, self.layer, self.causal = width, size, layer, causal
        self.register_buffer("centres", torch.zeros(k, 3))
        self.colour = nn.Parameter(torch.randn(k, width) * .02)
        self.position = nn.Parameter(torch.randn(size ** 2, width) * .01)
        if causal:
            self.sos = nn.Parameter(torch.randn(1, 1, width) * .02)
        self.blocks = nn.ModuleList(Block(width, heads, depth, causal) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def tokens(self, x):                                         # normalised [B,3,H,W] -> [B,N]
        pixels = 2 * denormalise(x).flatten(2).mT - 1            # [B,N,3]
        return torch.cdist(pixels, self.centres).argmin(2)

    def picture(self, tokens):                                   # [B,N] -> [B,3,H,W] in [0,1]
        return rearrange((self.centres[tokens] + 1) / 2, "b (h w) c -> b c h w", h=self.size)

    def encode(self, tokens, hidden=None, depth=None):           # [B,N], BERT: [B,N] bool -> [B,N,D] each
        t, maps = self.colour[tokens], []                        # [B,N,D]
        if self.causal:
            t = torch.cat([self.sos.expand(len(t), -1, -1), t[:, :-1]], 1)
        elif hidden is not None:
            t = t.masked_fill(hidden[..., None], 0)              # no token that says so
        t = t + self.position
        norms = [block.norm1 for block in self.blocks[1:]] + [self.norm]
        for block, norm in zip(self.blocks[:depth], norms, strict=False):
            t = block(t)
            maps.append(norm(t))                                 # as the next block reads it
        return maps

    def layers(self, x, depth=None):                             # [B,3,H,W] -> [B,D,H,W] each
        maps = self.encode(self.tokens(x), depth=depth)
        return [rearrange(t, "b (h w) d -> b d h w", h=self.size) for t in maps]

    def forward(self, x):                                        # [B,3,H,W] -> [B,D]
        return self.layers(x, self.layer)[-1].mean((2, 3))


class IGPT(nn.Module):
    """encoder: has .dim, .layer, .tokens(images) and .encode(tokens, hidden); hide: 1 if that is causal.
    Its centres must be set: see GPT."""

    def __init__(self, encoder, k, hide=1.):
        super().__init__()
        self.encoder, self.hide, self.head = encoder, hide, nn.Linear(encoder.dim, k, bias=False)
        nn.init.zeros_(self.head.weight)                         # the loss starts at ln K

    def logits(self, tokens, hidden):                            # [B,N] each -> [B,N,K]
        maps = self.encoder.encode(tokens, hidden)
        self.h = maps[self.encoder.layer - 1].mean(1)            # [B,D]
        return self.head(maps[-1]).float()

    def forward(self, v):                                        # [B,3,H,W] -> loss, nats a token
        tokens = self.encoder.tokens(v)                          # [B,N]
        hidden = torch.rand(tokens.shape, device=v.device) < self.hide   # [B,N]
        nats = F.cross_entropy(self.logits(tokens, hidden).mT, tokens, reduction="none")  # [B,N]
        return ((nats * hidden).sum(1) / hidden.sum(1).clamp(min=1)).mean()


def build(cfg):
    if cfg.encoder != Config.encoder:
        common.fail(f"--encoder {cfg.encoder} does not fit: a GPT-2 alone, see --width and --depth")
    if cfg.objective not in ("ar", "bert"):
        common.fail(f"--objective {cfg.objective} is unknown: give ar or bert")
    if not 0 < cfg.layer <= cfg.depth:
        common.fail(f"--layer {cfg.layer}: give 1 to {cfg.depth}, or more blocks by --depth")
    if cfg.width % cfg.heads:
        common.fail(f"--width {cfg.width} is no multiple of --heads {cfg.heads}")
    if cfg.weights:
        common.fail("--weights does not fit: no file is known for this encoder")
    ar = cfg.objective == "ar"
    encoder = GPT(cfg.k, cfg.image_size, cfg.width, cfg.depth, cfg.heads, cfg.layer, causal=ar)
    return IGPT(encoder, cfg.k, hide=1. if ar else cfg.hide)     # ar: each token is told, not seen


@torch.no_grad()
def complete(method, tokens, first):                             # [B,N] -> those from `first` on drawn anew
    tokens, place = tokens.clone(), torch.arange(tokens.shape[1], device=tokens.device)
    for n in place[first:]:
        p = method.logits(tokens, (place >= n).expand_as(tokens))[:, n].softmax(1)       # [B,K]
        tokens[:, n] = p.multinomial(1)[:, 0]
    return tokens


def save_layers(path, layers):
    from matplotlib.figure import Figure
    figure = Figure((4, 2.5), layout="tight")
    axis = figure.subplots(subplot_kw=dict(xlabel="layer", ylabel="linear probe, %"))
    for name, rows in dict(trained=layers, untrained=[row["untrained"] for row in layers]).items():
        axis.plot(range(1, len(rows) + 1), [row["linear"] for row in rows], "o-", label=name)
    axis.legend()
    common.write(path, lambda f: figure.savefig(f, dpi=110))


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    encoder, some = method.encoder, torch.randperm(len(data.images))[:500].to(run.device)
    pixels = data.images[some].movedim(1, 3).flatten(0, 2).cpu() / 127.5 - 1     # [M,3]
    encoder.centres.copy_(torch.from_numpy(kmeans2(pixels.numpy(), cfg.k, minit="++", seed=cfg.seed)[0]))
    train, test = (torch.cat([encoder.tokens(normalise(x)) for x in images.split(500)])
                   for images in (data.images, data.test_images))        # [M,N] each
    unigram = histogram_nats(train.view(-1, 1), test.view(-1, 1), cfg.k)
    histogram = histogram_nats(train, test, cfg.k)
    reference = {f"ln {cfg.k}": math.log(cfg.k), "unigram": unigram, "histogram": histogram}
    model = run.start(method, data, reference, optimizer)

    for step, index in run.steps(len(data.images)):
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        v = views(x, scale=None, p_jitter=0, grey=0)
        with run.autocast():
            loss = model(v)
        optimizer.zero_grad()
        run.finite(loss).backward()
        optimizer.step()
        run.log(loss, h=method.h)

    x, half = test[:8], test.shape[1] // 2                       # [8,N]
    rows = {"real": data.test_images[:8], f"in {cfg.k} colours": encoder.picture(x)}
    rows |= {f"completed, {i}": encoder.picture(complete(method, x, half)) for i in (1, 2)}
    common.save_grid(run.folder / "completions.png", rows, "the lower half is drawn, given the upper")
    with torch.no_grad():                                        # the last part may be smaller
        nats = sum(len(x) * method(normalise(x)).item() for x in data.test_images.split(100)) / len(test)
    result = run.finish(layers=True, nats=nats, nats_unigram=unigram, nats_histogram=histogram,
                        bits=nats / math.log(2) / 3)
    if "layers" in result:                                       # where there are labels
        save_layers(run.folder / "layers.png", list(result["layers"].values()))
    return result


if __name__ == "__main__":
    main(parse(Config, PAPER))
