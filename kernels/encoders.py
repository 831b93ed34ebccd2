"""Encoders: a ResNet under torchvision's parameter names, a ViT under timm's, so that published weights load.

ResNet: He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385. ViT: Dosovitskiy et al., ICLR 2021, 2010.11929.
Registers: Darcet et al., ICLR 2024, 2309.16588. No heads; a method takes the seam that it needs:

    ResNet: x [B,3,H,W] --embed--> [B,C,h,w] --layer1..--> layers(x): a map a stage --mean--> [B,dim]
    ViT:    x [B,3,H,W] --embed--> patches with positions [B,N,D], of which a method may keep a part
                        --encode--> [CLS], registers, patches [B,1+R+N,D] --cls or mean--> [B,dim]
            layers(x): a map a block;   attention(x): from [CLS] to the patches in the last block
"""
import argparse
import difflib
import math
import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Block(nn.Module):
    """ResNet's basic block (two 3x3) or bottleneck (1x1, 3x3, 1x1)."""
    def __init__(self, c_in: int, c: int, c_out: int, stride: int):
        super().__init__()
        convs = [(c_in, c, 3, stride), (c, c, 3, 1)]
        if c != c_out:
            convs = [(c_in, c, 1, 1), (c, c, 3, stride), (c, c_out, 1, 1)]
        for i, (a, b, k, s) in enumerate(convs, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.last, self.downsample = len(convs), None
        if stride > 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out))

    def forward(self, x):                                        # [B,C,h,w] -> [B,C',h/stride,w/stride]
        skip = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.last + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = F.relu(x if i < self.last else x + skip)
        return x


class ResNet(nn.Module):
    """Torchvision's names, no fc. Below 64 px the stem is a 3x3 convolution without pooling; its stride is 1,
    and 2 with fewer than four stages, which keeps resnet_small cheap on a CPU."""
    def __init__(self, depths=(2, 2, 2, 2), width=64, expand=1, image_size=224):
        super().__init__()
        small, stride = image_size < 64, 1 if image_size < 64 and len(depths) == 4 else 2
        kernel = 3 if small else 7
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(width), nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.dim, self.stages = width, [f"layer{i + 1}" for i in range(len(depths))]
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            stage, c = nn.Sequential(), width << i
            for j in range(depth):
                stage.append(Block(self.dim, c, c * expand, 2 if j == 0 and i > 0 else 1))
                self.dim = c * expand
            setattr(self, name, stage)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, x):                                          # [B,3,H,W] -> [B,C,h,w]
        return self.maxpool(F.relu(self.bn1(self.conv1(x))))

    def layers(self, x) -> list[Tensor]:                         # the map after each stage, [B,C_l,h_l,w_l]
        maps = [self.embed(x)]
        for name in self.stages:
            maps.append(getattr(self, name)(maps[-1]))
        return maps[1:]

    def forward(self, x):                                        # [B,3,H,W] -> [B,D]
        return self.layers(x)[-1].mean((2, 3))


class Convolutions(nn.Sequential):
    """Plain convolutions with ReLU, the first with a stride: the encoder of slot attention (2006.15055)."""
    def __init__(self, width=64, kernel=5, stride=1, depth=4):
        convs = [nn.Conv2d(width if i else 3, width, kernel, 1 if i else stride, kernel // 2)
                 for i in range(depth)]
        super().__init__(*[layer for conv in convs for layer in (conv, nn.ReLU())])
        self.dim = width

    def layers(self, x):                                         # [B,3,S,S] -> [B,C,h,h], in a list
        return [super().forward(x)]

    def forward(self, x):                                        # [B,3,S,S] -> [B,C]
        return self.layers(x)[-1].mean((2, 3))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} is no multiple of {heads} heads")
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def split(self, x):                                          # [B,N,D] -> q, k, v, each [B,h,N,D/h]
        return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)

    def forward(self, x):                                        # [B,N,D]
        return self.proj(rearrange(F.scaled_dot_product_attention(*self.split(x)), "b h n d -> b n (h d)"))


class ViTBlock(nn.Module):
    """Pre-norm transformer block, Eq. 2 and 3 of arXiv 2010.11929."""
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x):                                        # [B,N,D]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos_positions(dim: int, h: int, w: int) -> Tensor:
    """Fixed positions [h*w,dim]: half the channels tell the column, half the row, each [sin..., cos...]."""
    if dim % 4:
        raise ValueError(f"sines and cosines of two axes take a width that 4 divides, got {dim}")
    omega = 10_000. ** (-torch.arange(dim // 4) / (dim // 4))    # [D/4]
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (col, row)]        # [N,D/4] each
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)


def resize_positions(pos: Tensor, h: int, w: int) -> Tensor:
    """A square grid of positions [1,N,D] -> [1,h*w,D], bicubic."""
    side = math.isqrt(pos.shape[1])
    grid = rearrange(pos, "1 (h w) d -> 1 d h w", h=side)
    return pos if (h, w) == (side, side) else F.interpolate(grid, (h, w), mode="bicubic").flatten(2).mT


class ViT(nn.Module):
    """Timm's names, no head. Images of another size resize the positions. positions: "learned" or "sincos",
    which are fixed; pool: the features are the "cls" token or the "mean" of the patches."""
    def __init__(self, dim=192, depth=12, heads=3, patch=16, image_size=224, positions="learned", registers=0,
                 pool="cls"):
        super().__init__()
        if pool not in ("cls", "mean") or positions not in ("learned", "sincos"):
            raise ValueError(f"pool: cls or mean, positions: learned or sincos; got {pool}, {positions}")
        self.dim, self.patch, self.pool, self.prefix = dim, patch, pool, 1 + registers
        side = image_size // patch
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * .02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + side ** 2, dim) * .02)
        if positions == "sincos":
            grid = sincos_positions(dim, side, side)
            self.pos_embed.requires_grad_(False)[0] = torch.cat([torch.zeros(1, dim), grid])
        if registers:                                            # Darcet et al. 2023, arXiv 2309.16588
            self.reg_token = nn.Parameter(torch.randn(1, registers, dim) * .02)
        self.blocks = nn.Sequential(*[ViTBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for m in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(m.weight, std=.02)
            nn.init.zeros_(m.bias)

    def embed(self, x, mask=None, mask_token=None):              # [B,3,H,W] -> patches with positions [B,N,D]
        x = self.patch_embed.proj(x)                             # [B,D,h,w]
        tokens, (h, w) = x.flatten(2).mT, x.shape[2:]            # [B,N,D]
        if mask is not None:                                     # bool [B,N]: these become mask_token [1,1,D]
            tokens = torch.where(mask[..., None], mask_token.to(tokens.dtype), tokens)
        return tokens + resize_positions(self.pos_embed[:, 1:], h, w)

    def prepend(self, tokens):                                   # [B,N,D] -> [CLS], registers, patches
        first = [self.cls_token + self.pos_embed[:, :1]] + ([self.reg_token] if self.prefix > 1 else [])
        return torch.cat([t.expand(len(tokens), -1, -1) for t in first] + [tokens], 1)

    def encode(self, tokens):                                    # any subset [B,N,D] -> [B,1+R+N,D], normed
        return self.norm(self.blocks(self.prepend(tokens)))

    def forward(self, x):                                        # [B,3,H,W] -> [B,D]
        x = self.encode(self.embed(x))
        return x[:, 0] if self.pool == "cls" else x[:, self.prefix:].mean(1)

    def layers(self, x) -> list[Tensor]:                         # normed patches after each block, [B,D,h,w]
        tokens, maps, h = self.prepend(self.embed(x)), [], x.shape[2] // self.patch
        for block in self.blocks:
            tokens = block(tokens)
            maps.append(rearrange(self.norm(tokens)[:, self.prefix:], "b (h w) d -> b d h w", h=h))
        return maps

    def attention(self, x):                                      # last block, [CLS] to patches: [B,heads,h,w]
        tokens, last = self.blocks[:-1](self.prepend(self.embed(x))), self.blocks[-1]
        q, k, _ = last.attn.split(last.norm1(tokens))
        a = ((q[:, :, :1] @ k.mT)[:, :, 0] / q.shape[-1] ** .5).softmax(-1)     # [B,heads,1+R+N]
        return rearrange(a[..., self.prefix:], "b heads (h w) -> b heads h w", h=x.shape[2] // self.patch)


RESNETS = dict(resnet_small=((1, 1, 1), 32, 1), resnet18=((2, 2, 2, 2), 64, 1),
               resnet50=((3, 4, 6, 3), 64, 4))                   # blocks a stage, width, expansion
VITS = dict(vit_micro=(128, 4, 4), vit_tiny=(192, 12, 3), vit_small=(384, 12, 6), vit_base=(768, 12, 12),
            vit_large=(1024, 24, 16), vit_small_moco=(384, 12, 12))      # width, depth, heads; MoCo v3's


def create_encoder(name: str, image_size: int, **vit_options) -> nn.Module:
    """name: "resnet18", "vit_small", or with a patch, "vit_small/8"; else that is 16, or 1/8 below 128 px."""
    name, slash, patch = name.partition("/")
    if name not in RESNETS | VITS:
        near = difflib.get_close_matches(name, RESNETS | VITS, 1) or ["resnet_small"]
        raise ValueError(f"{name} is unknown, did you mean {near[0]}? There are {' '.join(RESNETS | VITS)}")
    if slash and (name in RESNETS or not re.fullmatch("[1-9][0-9]*", patch)):
        raise ValueError(f"{name}/{patch}: a patch is that of a ViT, a whole number, such as vit_micro/4")
    if name in RESNETS and vit_options:
        raise ValueError(f"{name} is no ViT, which this method needs: give one of {' '.join(VITS)}")
    if name in RESNETS:
        return ResNet(*RESNETS[name], image_size)
    patch = max(1, int(patch or (16 if image_size >= 128 else image_size // 8)))
    if image_size % patch:
        raise ValueError(f"{image_size} pixels are no multiple of the patch {patch}: give {name}/PATCH")
    return ViT(*VITS[name], patch, image_size, **vit_options)


def read_checkpoint(file) -> dict:
    """torch.load that never runs code from the file; ValueError where it cannot be read."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # flags, in the files of DINO and MAE
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except OSError as e:
        raise ValueError(f"cannot read {file} ({e.strerror})") from e
    except Exception as e:
        raise ValueError(f"{file} is no checkpoint of plain tensors, or damaged: not loaded") from e


def load_weights(encoder: nn.Module, file) -> nn.Module:
    """Published weights (torchvision, timm, DINO, MAE, our encoder.pt) into `encoder`, strictly: all of it
    must be there and fit, else ValueError. Heads and decoders are left out; positions are resized."""
    state = read_checkpoint(file)
    if state.get("arch") == "vit_small" and isinstance(encoder, ViT) and encoder.blocks[0].attn.heads == 6:
        raise ValueError(f"{file} is MoCo v3's, whose ViT-S has 12 heads: give --encoder vit_small_moco/16")
    for key in ("model", "state_dict", "teacher"):
        state = state[key] if isinstance(state.get(key), dict) else state
    wrapped = r"^((module|backbone|encoder|encoder_q|base_encoder)\.)+"
    state = {re.sub(wrapped, "", str(k)): v for k, v in state.items()}
    foreign = r"(fc|head|fc_norm|projector|predictor|encoder_k|momentum_encoder)\.|decoder_|mask_token|queue"
    state = {k: v for k, v in state.items() if not re.match(foreign, k)}
    if torch.is_tensor(pos := state.get("pos_embed")) and isinstance(encoder, ViT):
        side, n = math.isqrt(encoder.pos_embed.shape[1] - 1), pos.shape[1] - 1 if pos.ndim == 3 else 0
        if n < 1 or n != math.isqrt(n) ** 2 or len(pos) > 1 or not pos.is_floating_point():
            raise ValueError(f"{file} does not fit: positions {list(pos.shape)} are no [CLS] and a square")
        state["pos_embed"] = torch.cat([pos[:, :1], resize_positions(pos[:, 1:], side, side)], 1)
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as e:
        raise ValueError(f"{file} does not fit: {' '.join(str(e).split())[:300]}") from e
    return encoder
