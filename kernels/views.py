"""Views: draw the parameters of random views, for kernels/augment.py to apply."""
import math
from functools import partial

import torch

from kernels.augment import HUE, MEAN, STD, Params, apply, normalise, unit

__all__ = ["MEAN", "STD", "Params", "apply", "denormalise", "draw", "normalise", "views"]


def denormalise(x):
    """What normalise made [B,3,H,W] -> colours in 0..1 again."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x * std + mean).clamp(0, 1)


def draw_boxes(n, height, width, scale, ratio, device):
    """Ten tries at (area, aspect) an image: the first that fits, else the largest centred box allowed."""
    area = height * width * torch.empty(n, 10, device=device).uniform_(*scale)              # [n,10]
    aspect = torch.empty(n, 10, device=device).uniform_(*map(math.log, ratio)).exp()        # [n,10] w / h
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()                   # [n,10]
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)                                 # [n,10]
    found, first = fits.any(1), fits.int().argmax(1, keepdim=True)                          # [n] [n,1]
    w = torch.where(found, w.gather(1, first)[:, 0], min(width, round(height * ratio[1])))  # [n]
    h = torch.where(found, h.gather(1, first)[:, 0], min(height, round(width / ratio[0])))  # [n]
    room = torch.stack([height - h, width - w])                                             # [2,n]
    corner = torch.where(found, (room + 1) * torch.rand(2, n, device=device), room / 2)     # [2,n]
    return torch.stack([*corner.floor(), h, w], 1).long()                                   # [n,4]


def draw(n, height, width, *, scale=(.2, 1.), ratio=(3 / 4, 4 / 3), flip=.5, jitter=(.4, .4, .4, .1),
         p_jitter=.8, grey=.2, blur=0., sigma=(.1, 2.), solarise=0., device="cpu"):
    """Parameters of one view of each of n images, as apply() takes them. scale: the share of the area that a
    crop has, None is no crop; ratio: its width over its height; jitter: how much brightness, contrast and
    saturation change, as factors 1 - s .. 1 + s, and hue, in turns -s .. s; sigma: of the blur, in pixels of
    the view. flip, p_jitter, grey, blur and solarise are probabilities, 0 = off and free."""
    rand, factors, order = partial(torch.rand, device=device), None, None
    if p_jitter:
        strength = torch.cat([torch.full((1,), s, device=device) for s in jitter])           # [4]   no sync
        same = 1. * (torch.arange(4, device=device) != HUE)                                  # [4]   1 1 1 0
        low, high = same - strength, same + strength                                         # [4]
        low[:HUE].clamp_(min=0)                                                              # no factor < 0
        factors = torch.where(rand(n, 1) < p_jitter, low + (high - low) * rand(n, 4), same)  # [n,4]
        order = rand(n, 4).argsort(1)                                                        # [n,4] any of 24
    return Params(
        box=draw_boxes(n, height, width, scale, ratio, device) if scale else None,
        flip=rand(n) < flip if flip else None,
        jitter=factors,
        order=order,
        grey=rand(n) < grey if grey else None,
        sigma=torch.where(rand(n) < blur, sigma[0] + (sigma[1] - sigma[0]) * rand(n), 0) if blur else None,
        solarise=rand(n) < solarise if solarise else None)


def views(x, size=None, impl="auto", **options):
    """One view [B,3,size,size] of each image [B,3,H,W], uint8 or floats in 0..1, normalised; call again for
    the next (multi-crop: a smaller size, scale). options: see draw(). The images get no gradient."""
    unit(x[:0])                                                   # the ValueErrors come first
    params = draw(len(x), *x.shape[2:], device=x.device, **options)
    return apply(x, params, size or x.shape[2], impl)
