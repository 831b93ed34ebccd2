"""iBOT (2022): tell a slow copy's view of hidden patches.

DINO's agreement on soft clusters, for [CLS] across two crops, and for every hidden patch with the same patch
as the slow copy sees it, unhidden: the copy is the tokenizer. AttMask hides what the copy's [CLS] looks at.

Zhou, Wei, Wang, Shen, Xie, Yuille, Kong. iBOT: Image BERT Pre-Training with Online Tokenizer. ICLR 2022,
arXiv 2111.07832. Kakogeorgiou, Gidaris, Psomas, Avrithis, Bursuc, Karantzalos, Komodakis. What to Hide from
Your Students: Attention-Guided Masked Image Modeling. ECCV 2022, arXiv 2203.12719.

    x --2 crops--> v [2B,3,S,S] --> teacher (kept) --> head --> t [2B,1+N,K] --(t - c) / tau_t--> // p_t
                   |                  |    ~~> m          ~~> m         ~~> c, one of [CLS], one of patches
                   |   attention of [CLS] [2B,N] --> mask [2B,N]                                     | loss
                   '--hidden patches: a mask token--> student --> head --> s [2B,1+N,K] --s/tau_s--> p_s
         loss = [CLS], against the other crop's + hidden patches, against the same of the same crop

Good at: features of patches, and of [CLS] for k-NN. Not at: few steps, after which DINO is level.

Run      python methods/ibot.py
         linear 47.4 ± 1.4 % (untrained 35.9; each seed at least +9), k-NN 42.2 ± 1.1 (32.5); 68 s on 2 cores
Differs  as dino.py: no stochastic depth, rows of the last layer of length 1, the rate falls to 0, bilinear
         crops, positions resized exactly; the quick run has grey grounds, a sharper and faster teacher, no
         local crops, no blur.
"""
import copy
import math
import sys
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
from kernels.attention import attention
from kernels.masks import block_mask
from kernels.prototype_ce import prototype_ce
from kernels.views import denormalise, normalise, views

MASKS = "random", "block", "attmask_high", "attmask_low", "attmask_hint"


@dataclass
class Config(common.Config):
    data: str = "toys:grey"        # toys, toys:sky,rho=0 (any switch of toys()), cifar10, folder:PATH
    encoder: str = "vit_micro/8"   # a ViT: vit_micro, vit_tiny, vit_small/8, vit_base, vit_large
    steps: int = 800               # optimisation steps
    batch_size: int = 32           # images a step, all processes together
    lr: float = 5e-4               # peak learning rate: linear warm-up, then half a cosine to 0
    weight_decay: float = .04      # on weights and tokens at the start; changes by a cosine
    decay_end: float = .4          # the same at the end
    warmup: float = .1             # part of the run in which the learning rate rises
    hidden: int = 512              # width of the head's hidden layers
    dim: int = 64                  # width of z
    k: int = 256                   # number K of prototypes, the same for [CLS] and patches
    tau_s: float = .1              # temperature of the student
    tau_t: float = .03             # temperature of the teacher at the start
    tau_t_end: float = .03         # the same after the next share of the run, risen linearly
    rise: float = .1               # that share
    m: float = .99                 # momentum of the teacher at the start; rises to 1 by a cosine
    freeze: float = .3             # part of the run in which the prototypes stay as they are
    clip: float = 3.               # largest norm of a tensor's gradient; 0 is any
    size: int = 32                 # side of a global crop in pixels
    size_local: int = 16           # side of a local crop
    local: int = 0                 # number of local crops
    crop: float = .4               # global crops have at least this share of the area, local ones at most
    crop_local: float = .15        # smallest share of the area in a local crop
    blur: float = 0.               # probability of blur in view 2; if positive, 1 in view 1, .5 in local ones
    solarise: float = 0.           # probability of solarising view 2
    mask: str = "block"            # what is hidden: random, block, attmask_high, attmask_low, attmask_hint
    share: float = 1.              # share of the images to train on; k-NN and probe have all of them


# The official command for ViT-S: rate 5e-4 x B/256, warm-up 10 epochs, prototypes frozen for 1. AttMask's:
# --epochs 100 --batch_size 240 --lr 4.7e-4 --warmup .1 --rise .3 --freeze .01 --mask attmask_hint, beside it.
PAPER = dict(data="folder:imagenet", image_size=224, encoder="vit_small/16", epochs=800, batch_size=1024,
             lr=2e-3, warmup=.0125, hidden=2048, dim=256, k=8192, tau_t=.04, tau_t_end=.07, rise=.0375,
             m=.996, freeze=.00125, size=224, size_local=96, local=10, crop=.25, crop_local=.05, blur=.1,
             solarise=.2)


class Head(nn.Module):
    """[..,D] -> K cosines between z and the prototypes."""

    def __init__(self, width, hidden, dim, k):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                    nn.Linear(hidden, dim))
        for m in (m for m in self.layers if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(m.weight, std=.02)
            nn.init.zeros_(m.bias)
        self.prototypes = nn.Linear(dim, k, bias=False)

    def forward(self, h):                                        # [..,D] -> [..,K]
        z = F.normalize(self.layers(h), dim=-1)                  # [..,P]
        return F.linear(z, F.normalize(self.prototypes.weight, dim=1))


def draw_masks(kind, a, p=.5, low=.1, high=.5, show=.1):
    """a [B,N], the attention of [CLS] -> mask [B,N], True = hidden. With probability p an image is masked, by
    a share of low..high, each image's own; AttMask has one a batch. Its hint shows some of the top again."""
    (b, n), device = a.shape, a.device
    r = low + (high - low) * torch.rand(b, 1, device=device)     # [B,1]
    if kind == "block":
        rng = np.random.default_rng(torch.randint(2 ** 31, ()).item())
        side = math.isqrt(n)
        blocks = [block_mask(side, share * n, (side // 3) ** 2, rng) for share in r[:, 0].tolist()]
        mask = torch.stack(blocks).flatten(1).to(device)
    else:
        score = torch.rand_like(a) if kind == "random" else a if kind == "attmask_low" else -a
        rank = score.argsort(1).argsort(1)                       # [B,N], 0 is hidden first
        mask = rank < ((r if kind == "random" else r[:1]) * n).int()
    if kind == "attmask_hint":
        again = low + (high - low) * torch.rand((), device=device)       # drawn anew, as in the code
        luck = torch.rand_like(a).masked_fill(rank >= int(show * n), math.inf)   # [B,N]
        mask &= luck.argsort(1).argsort(1) >= int(show * again * n)
    return mask & (torch.rand(b, 1, device=device) < p)


def look(encoder, x):                        # -> tokens [B,1+R+N,D], attention of [CLS] to the patches [B,N]
    """The pass of a ViT, with its last block opened: where [CLS] looks there, on the mean of the heads."""
    t, last = encoder.blocks[:-1](encoder.prepend(encoder.embed(x))), encoder.blocks[-1]
    cls = torch.zeros(1, dtype=torch.int64, device=x.device)
    out, a = attention(*last.attn.split(last.norm1(t)), rows=cls)        # [B,h,1+R+N,d], [B,h,1,1+R+N]
    t = t + last.attn.proj(rearrange(out, "b h n d -> b n (h d)"))
    t = t + last.mlp(last.norm2(t))
    return encoder.norm(t), a[:, :, 0, encoder.prefix:].mean(1)


def perplexity(t, c, tau):                                       # [R,K], [K] -> prototypes in use, 1..K
    return torch.special.entr(F.softmax((t.float() - c) / tau, 1).mean(0)).sum().exp()


class IBOT(nn.Module):
    """encoder: a ViT with embed, prepend, blocks, encode, .dim, .prefix; the teacher's, the one that is kept.
    Call update_teacher(m) after every optimizer step. gather: [B,K] -> the rows of all processes."""

    def __init__(self, encoder, hidden=512, dim=64, k=256, tau_s=.1, mask="block", gather=lambda t: t):
        super().__init__()
        self.tau_s, self.kind, self.gather = tau_s, mask, gather
        self.encoder, self.head = encoder, Head(encoder.dim, hidden, dim, k)
        self.student = copy.deepcopy(nn.Sequential(self.encoder, self.head))
        self.encoder.requires_grad_(False)
        self.head.requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.dim))
        self.register_buffer("center", torch.zeros(2, k))        # of [CLS], of patches

    def forward(self, v1, v2, *small, tau_t=.04):                # V crops [B,3,.,.], two global -> loss
        v, (c, c_patch) = torch.cat([v1, v2]), self.center       # [2B,3,S,S], [K] each
        with torch.no_grad():
            h, a = look(self.encoder, v)                         # [2B,1+R+N,D], [2B,N]
            self.h, h = h[:, 0], h[:, self.encoder.prefix:]      # [2B,D], [2B,N,D]
            self.t, self.t_patch = self.head(self.h), self.head(h)       # [2B,K], [2B,N,K]
            self.mask = draw_masks(self.kind, a)                 # [2B,N]
            self.parts = dict(perplexity=perplexity(self.t, c, tau_t),
                              patch_perplexity=perplexity(self.t_patch.flatten(0, 1), c_patch, tau_t))
        encoder, head = self.student
        h = encoder.encode(encoder.embed(v, self.mask, self.mask_token))         # [2B,1+R+N,D]
        hidden, hs = h[:, encoder.prefix:][self.mask], [h[:, 0]]         # [M,D], [[2B,D]]
        hs += [encoder(torch.cat(small))] if small else []       # local crops hide nothing, [(V-2)B,D]
        s, t = head(torch.cat(hs)).split(len(v1)), self.t.chunk(2)       # [B,K] each, of V and of 2 crops
        cls = torch.stack([prototype_ce(s[i], t[g], self.tau_s, tau_t, c).mean()
                           for g in (0, 1) for i in range(len(s)) if i != g]).mean()         # 2V-2 terms
        patch = prototype_ce(head(hidden), self.t_patch[self.mask], self.tau_s, tau_t, c_patch)      # [M]
        count = self.mask.sum(1, keepdim=True).expand_as(self.mask)[self.mask]   # [M], hidden with it
        patch = (patch / count).sum() / len(v)                   # images without hidden ones count, as 0
        self.parts |= dict(cls=cls.detach(), patch=patch.detach())
        return cls + patch

    @torch.no_grad()
    def update_teacher(self, m):
        teacher = nn.Sequential(self.encoder, self.head)
        for t, s in zip(teacher.parameters(), self.student.parameters(), strict=True):
            t.lerp_(s, 1 - m)                                    # theta_t <- m theta_t + (1-m) theta_s
        mean = torch.stack([self.t.mean(0), self.t_patch.mean((0, 1))])[None].to(self.center.dtype)
        self.center.lerp_(self.gather(mean).mean(0), .1)         # c <- .9 c + .1 mean, after their use


def build(cfg):
    if cfg.mask not in MASKS:
        common.fail(f"--mask {cfg.mask} is unknown: give one of {' '.join(MASKS)}")
    encoder = make_encoder(cfg, pool="cls")                      # an option of ViTs alone
    if cfg.size < 2 * encoder.patch or cfg.local and cfg.size_local < encoder.patch:
        common.fail(f"--size {cfg.size}, --size_local {cfg.size_local}: few pixels for patches of "
                    f"{encoder.patch}")
    n = (cfg.size // encoder.patch) ** 2                         # a hint shows at most .05 n of them
    if cfg.mask == "attmask_hint" and n <= 20:
        common.fail(f"--mask attmask_hint: of {n} patches none would be shown again: give smaller ones")
    return IBOT(encoder, cfg.hidden, cfg.dim, cfg.k, cfg.tau_s, cfg.mask, common.gather)


@torch.no_grad()
def picture(method, images, times=2):                            # uint8 [n,3,H,W] -> rows of images
    """Enlarged images; where [CLS] looks; what each way to mask would hide; a colour for each prototype."""
    x = F.interpolate(normalise(images), scale_factor=times, mode="bilinear")    # [n,3,H,W]
    (h, a), p = look(method.encoder.eval(), x), method.encoder.patch     # [n,1+R+N,D], [n,N]
    def enlarge(y):                                              # [n,N,1 or 3] -> [n,3,H,W], nearest
        y = rearrange(y.float(), "n (h w) c -> n c h w", h=x.shape[2] // p).expand(-1, 3, -1, -1)
        return F.interpolate(y, scale_factor=p)
    hidden = {kind: enlarge(draw_masks(kind, a, 1, .3, .3)[..., None]) > 0 for kind in MASKS}
    rows = {"x": denormalise(x), "attention": enlarge((a / a.amax(1, keepdim=True))[..., None])}
    rows |= {kind: denormalise(x).masked_fill(mask, .5) for kind, mask in hidden.items()}
    words = method.head(h[:, method.encoder.prefix:]).argmax(2)  # [n,N]
    colours = torch.rand(method.center.shape[1], 3, generator=torch.Generator().manual_seed(0))      # [K,3]
    return rows | {"prototypes": enlarge(colours.to(words.device)[words])}


def main(cfg):
    run = Run(cfg, __file__)
    data = load_data(cfg, run.device)
    method = build(cfg).to(run.device)
    optimizer = make_optimizer(cfg, method)
    model = run.start(method, data, {f"1.5 ln {cfg.k}": 1.5 * math.log(cfg.k)}, optimizer)
    one = dict(scale=(cfg.crop, 1.), jitter=(.4, .4, .2, .1), grey=.2, blur=float(cfg.blur > 0))
    two = one | dict(blur=cfg.blur, solarise=cfg.solarise)
    local = one | dict(scale=(cfg.crop_local, cfg.crop), blur=.5 * (cfg.blur > 0))

    for step, index in run.steps(len(data.images)):
        index = index % max(1, int(cfg.share * len(data.images)))        # a share of the images
        x = data.images[index]                                   # [B,3,H,W] uint8
        set_lr(optimizer, cosine(step, run.total, cfg.lr, warmup=cfg.warmup))
        optimizer.param_groups[0]["weight_decay"] = cosine(step, run.total, cfg.weight_decay, cfg.decay_end)
        tau_t = cfg.tau_t + (cfg.tau_t_end - cfg.tau_t) * min(1, step / max(1, cfg.rise * run.total))
        v1, v2 = views(x, cfg.size, **one), views(x, cfg.size, **two)
        small = [views(x, cfg.size_local, **local) for _ in range(cfg.local)]
        with run.autocast():
            loss = model(v1, v2, *small, tau_t=tau_t)
        optimizer.zero_grad()
        run.finite(loss).backward()
        for p in (*method.student.parameters(), method.mask_token):
            nn.utils.clip_grad_norm_(p, cfg.clip or math.inf)
        if step < int(cfg.freeze * run.total):
            method.student[1].prototypes.weight.grad = None      # no step, no weight decay
        optimizer.step()
        m = cosine(step, run.total, cfg.m, 1.)
        method.update_teacher(m)
        run.log(loss, h=method.h, **method.parts, m=m)

    common.save_grid(run.folder / "masks.png", picture(method, data.test_images[:10]))
    return run.finish()


if __name__ == "__main__":
    main(parse(Config, PAPER))
