"""Decoders of slots: what K vectors [B,K,D] tell of an image or of the features of its patches.

Broadcast: each slot alone paints a grid with its own positions (Watters et al. 2019, arXiv 1901.07017), as in
Slot Attention (2006.15055). MLP: the same on patches, as in DINOSAUR (2209.14860). Both mix the slots by a
softmax of their masks. Autoregressive: a transformer tells each patch from those before it and from the
slots (2209.14860), in one of nine orders (SPOT, 2312.00648); its masks are where it looks for each patch.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def axes(n: int) -> Tensor:
    """x and y of n x n places [n*n,2], from -1 to 1."""
    at = (torch.arange(n) + .5) / n * 2 - 1
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), 2).flatten(0, 1)


def quadratic(r: Tensor) -> Tensor:
    """[...,2] -> [...,5]: x, y, their squares and product, of which lines and ovals are linear functions."""
    return torch.cat([r, r.square(), r.prod(-1, keepdim=True)], -1)


def frames(a: Tensor) -> tuple[Tensor, Tensor]:
    """Each slot's frame of reference (2302.04973): the mean place of its attention [B,K,N] on a square map,
    from -1 to 1, and its spread along x and y, a standard deviation of .1 and more; [B,K,2] each."""
    w, at = a.float() + 1e-6, axes(math.isqrt(a.shape[2])).to(a.device)  # with no attention: in the middle
    w = w / w.sum(2, keepdim=True)
    with torch.autocast(a.device.type, enabled=False):           # bf16 would lose the difference of squares
        centre = w @ at
        return centre, (w @ at.square() - centre.square() + .01).sqrt()


def seen_from(centre: Tensor, spread: Tensor, places: Tensor) -> Tensor:
    """Places [N,2] in each slot's frame [B,K,2], [B,K,2]: from the centre, in spreads, beyond four as four ->
    quadratic [B,K,N,5]."""
    return quadratic(((places - centre[:, :, None]) / spread[:, :, None]).clamp(-4, 4))


class Broadcast(nn.Module):
    """Slots [B,K,D] and their frames [B,K,2] -> colours and a logit of the mask [B,K,4,size,size]. up:
    deconvolutions of 5 x 5 and stride 2; with none, 1 x 1 on the grid, enlarged."""

    def __init__(self, d, width, grid, up, size):
        super().__init__()
        self.grid, self.size, self.slot, self.position = grid, size, nn.Linear(d, width), nn.Linear(5, width)
        self.register_buffer("places", axes(grid))               # [gg,2]
        convs = [nn.ConvTranspose2d(width, width, 5, 2, 2, 1) for _ in range(up)]
        convs += [nn.Conv2d(width, width, 5, 1, 2)] if up else [nn.Conv2d(width, width, 1) for _ in range(2)]
        self.layers = nn.Sequential(nn.ReLU(), *[layer for conv in convs for layer in (conv, nn.ReLU())],
                                    nn.Conv2d(width, 4, 3 if up else 1, 1, int(up > 0)))

    def forward(self, s, centre, spread):
        h = self.slot(s)[:, :, None] + self.position(seen_from(centre, spread, self.places))     # [B,K,gg,W]
        h = h.flatten(0, 1).mT.unflatten(2, (self.grid, self.grid))      # [BK,W,g,g]
        out = F.interpolate(self.layers(h), self.size, mode="bilinear")  # [BK,4,S,S]
        return out.unflatten(0, s.shape[:2])


class MLP(nn.Module):
    """Slots [B,K,D] -> features [B,N,C], masks [B,K,N] that sum to 1 over the slots. A slot is added
    to a learned position of each patch; three hidden layers tell its features and its logit there. relative:
    to the patch's position in the slot's frame, two [B,K,2], as well (2302.04973)."""

    def __init__(self, d, c, n, hidden, relative=False):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 1, n, d) * .02)
        self.relative = nn.Linear(5, d) if relative else None
        self.register_buffer("places", axes(math.isqrt(n)))      # [N,2]
        widths = (d, hidden, hidden, hidden)
        layers = [f for a, b in zip(widths, widths[1:], strict=False) for f in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, c + 1))

    def forward(self, s, h=None, order=0, frame=None):           # the target h is not looked at
        at = self.positions                                      # [1,1,N,D]
        if self.relative:
            at = at + self.relative(seen_from(*frame, self.places))      # [B,K,N,D]
        out = self.layers(s[:, :, None] + at)                    # [B,K,N,C+1]
        masks = out[..., -1].softmax(1)                          # [B,K,N]
        return torch.einsum("bknc,bkn->bnc", out[..., :-1], masks), masks


def orders(side: int) -> Tensor:
    """SPOT's nine orders of side x side patches [9,N], row by row first: rows and columns from each corner,
    and a spiral from the middle. orders[o,i] is the patch that comes at i."""
    grid = torch.arange(side * side, device="cpu").view(side, side)
    found = [g.flip(dims) for g in (grid, grid.T) for dims in ((), (0,), (1,), (0, 1))]
    return torch.stack([g.flatten() for g in found] + [spiral(grid)])


def spiral(grid: Tensor) -> Tensor:
    """The entries of a square grid from its middle outwards: a way in from the corner, backwards."""
    out = []
    while grid.numel():
        out += grid[0].tolist()
        grid = grid[1:].T.flip(0)                                # the rest, turned: its next side is on top
    return torch.tensor(out[::-1], device="cpu")


class Block(nn.Module):
    """Pre-norm decoder block: among the patches so far, to the slots, MLP; no biases in attention."""

    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(c) for _ in range(3))
        self.qkv, self.out = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c, bias=False)
        self.q, self.kv = nn.Linear(c, c, bias=False), nn.Linear(c, 2 * c, bias=False)
        self.out_cross = nn.Linear(c, c, bias=False)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.ReLU(), nn.Linear(4 * c, c))

    def split(self, x):                                          # [B,N,C] -> [B,heads,N,C/heads]
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, memory, causal=True):                   # [B,N,C], [B,K,C] -> [B,N,C], [B,heads,N,K]
        q, k, v = map(self.split, self.qkv(self.norms[0](x)).chunk(3, 2))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        q, (k, v) = self.split(self.q(self.norms[1](x))), map(self.split, self.kv(memory).chunk(2, 2))
        a = (q @ k.mT / q.shape[3] ** .5).softmax(3)
        x = x + self.out_cross((a @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[2](x)), a


class Autoregressive(nn.Module):
    """Slots [B,K,D], target features h [B,N,C] -> features [B,N,C], masks [B,K,N]: where the last block looks
    for each patch, the mean of its heads. order: 0, row by row, to 8, see orders(); each has its own start.
    parallel: every input is a mask token and a learned position, and no patch sees another's target."""

    def __init__(self, d, c, n, depth=4, heads=4, parallel=False):
        super().__init__()
        self.parallel = parallel
        self.register_buffer("orders", orders(math.isqrt(n)))    # [9,N]
        self.first = nn.Parameter(torch.randn(9, c) * .02)
        self.project = nn.Sequential(nn.Linear(c, c, bias=False), nn.LayerNorm(c))
        self.memory = nn.Sequential(nn.Linear(d, c, bias=False), nn.LayerNorm(c))
        self.blocks = nn.ModuleList(Block(c, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(c)
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
        if parallel:
            self.token = nn.Parameter(torch.randn(1, n, c) * .02)        # mask token and positions in one

    def forward(self, s, h, order=0, frame=None):
        i, memory = self.orders[order], self.memory(s)           # [N], [B,K,C]
        if self.parallel:
            x = self.token.expand(len(h), -1, -1)[:, i]          # [B,N,C]
        else:                                                    # a patch is told from those before it
            x = torch.cat([self.first[order].expand(len(h), 1, -1), h[:, i[:-1]]], 1)
        x = self.project(x)
        for block in self.blocks:
            x, a = block(x, memory, causal=not self.parallel)
        back = i.argsort()
        return self.norm(x)[:, back], a.mean(1).mT[:, :, back]
