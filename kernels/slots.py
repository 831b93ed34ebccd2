"""Slots: K vectors that compete, over T rounds, for the places of a feature map; and what tells that they do.

Object-Centric Learning with Slot Attention. Locatello et al., NeurIPS 2020, arXiv 2006.15055, Algorithm 1.
Learned queries, trained as if the last round had started from them: BO-QSA, Jia, Liu, Huang, ICLR 2023,
arXiv 2210.08990; SPOT (2312.00648) uses them too.

    x [B,N,C] --LayerNorm--> k, v [B,N,D]
    s [B,K,D] --LayerNorm--> q --attention, softmax over slots--> u [B,K,D] --GRU, state s--> + MLP --> s
       ^ drawn or learned                                                                 T times |
       '------------------------------------------------------------------------------------------'
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.slot_attention import slot_attention


def glorot(module: nn.Module):
    """As Keras, and so the official code, initialises: weights by Glorot, orthogonal in a GRU's state."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.GRUCell):
            nn.init.xavier_uniform_(m.weight_ih)
            nn.init.orthogonal_(m.weight_hh)
            nn.init.zeros_(m.bias_ih)
            nn.init.zeros_(m.bias_hh)


class Slots(nn.Module):
    """k slots of width d from inputs [B,N,dim]. init: "gaussian", one that all slots share, drawn anew for
    each image, in tests as well; "queries", k learned ones in a fixed order, with the bi-level gradient, or,
    without bilevel, the gradient through all rounds."""

    def __init__(self, k, dim, d, rounds=3, hidden=None, init="gaussian", bilevel=True):
        super().__init__()
        if init not in ("gaussian", "queries"):
            raise ValueError(f"init must be gaussian or queries, got {init}")
        self.k, self.rounds, self.init, hidden = k, rounds, init, hidden or 2 * d
        self.bilevel = bilevel and init == "queries"
        self.norm_inputs, self.norm_slots = nn.LayerNorm(dim), nn.LayerNorm(d)
        self.to_q, self.gru = nn.Linear(d, d, bias=False), nn.GRUCell(d, d)
        self.to_k, self.to_v = nn.Linear(dim, d, bias=False), nn.Linear(dim, d, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, d))
        self.mu = nn.Parameter(torch.empty(1, k if init == "queries" else 1, d))
        if init == "gaussian":
            self.log_sigma = nn.Parameter(torch.empty(1, 1, d))
        glorot(self)
        for p in (self.mu, getattr(self, "log_sigma", self.mu)):
            nn.init.xavier_uniform_(p)

    def start(self, b):                                          # -> [B,K,D]
        mu = self.mu.expand(b, self.k, -1)
        return mu if self.init == "queries" else mu + self.log_sigma.exp() * torch.randn_like(mu)

    def forward(self, x, s=None):                                # [B,N,C] -> slots [B,K,D], maps [T,B,K,N]
        x, first = self.norm_inputs(x), self.start(len(x)) if s is None else s
        k, v, s, maps = self.to_k(x), self.to_v(x), first, []
        for i in range(self.rounds):
            if self.bilevel and i == self.rounds - 1:            # value of s, gradient to the queries
                s = s.detach() + first - first.detach()
            u, a = slot_attention(self.to_q(self.norm_slots(s)), k, v, maps=True)        # [B,K,D], [B,K,N]
            s = self.gru(u.flatten(0, 1), s.flatten(0, 1)).view_as(s)    # the state is s before its norm
            s = s + self.mlp(s)
            maps.append(a)
        return s, torch.stack(maps)


def enlarge(a: Tensor, size: int) -> Tensor:
    """Masks [B,K,N] of a square map -> [B,K,size,size], bilinear: as they are scored."""
    side = math.isqrt(a.shape[2])
    return F.interpolate(a.float().unflatten(2, (side, side)), size, mode="bilinear")


def monitors(masks: Tensor) -> dict[str, float]:
    """Of soft masks [B,K,H,W] or [B,K,N]. used: slots that win 1 % of an image and more, 1..K; largest: the
    share of the one that wins most; masks_vary: std over the images, 0 where masks are places, not objects;
    all runs start there, so that complaints() judges at the end."""
    winner = masks.flatten(2).max(1).indices                     # [B,N]  a CPU finds it faster than argmax
    won = F.one_hot(winner, masks.shape[1]).float().mean(1)      # [B,K]
    return dict(used=(won >= .01).sum(1).float().mean().item(), largest=won.amax(1).mean().item(),
                masks_vary=masks.float().std(0).mean().item())


def complaints(masks: Tensor) -> list[str]:
    """The known failures, of masks [B,K,...] of 100 images and more, in plain words."""
    m, k = monitors(masks), masks.shape[1]
    return [text for failed, text in (
        (m["used"] < 1.5, f"one slot takes everything (slots in use: {m['used']:.2f})"),
        (1.5 <= m["used"] < k / 2, f"most slots are ignored (in use: {m['used']:.2f} of {k})"),
        (m["masks_vary"] < .05, f"masks are the same for all images (std {m['masks_vary']:.3f}): places, not "
                               "objects")) if failed]


COLOURS = torch.tensor([[.9, .9, .9], [.9, .1, .1], [.1, .6, .1], [.1, .3, .9], [.95, .75, .1], [.6, .2, .7],
                        [.1, .75, .75], [.95, .5, .1], [.5, .3, .1], [.95, .5, .75], [.4, .4, .4], [0, 0, 0]])


def coloured(segments: Tensor) -> Tensor:
    """Labels [B,H,W] -> [B,3,H,W], a colour each."""
    return COLOURS.to(segments.device)[segments.long() % len(COLOURS)].movedim(3, 1)
