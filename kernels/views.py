"""Views: augment a batch in plain tensor code, on the device of the data, each image with its own parameters.

SimCLR: Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv 2002.05709 (appendix A).
BYOL: Grill et al., NeurIPS 2020, arXiv 2006.07733 (appendix B: blur, solarise, order of the operations).

    draw(n, H, W, ranges, probabilities) --> Params: a row per image, None = off
                                              |
    x [B,3,H,W] --/255--> crop, flip, resize --> jitter --> grey --> blur --> solarise --> (x - MEAN) / STD
      uint8               Wy @ x @ Wx.T          own order           G @ x @ G.T           [B,3,S,S] float32

Every operation is torchvision's, in float32, not rounded to 1/255 in between (and grey has .299, not .2989).

Resize: crop, flip and resize are linear and separable, so an image needs two small matrices. Row i holds the
weights of the input pixels that make output pixel i: a triangle that reaches one input pixel to each side
where the crop is enlarged (bilinear), one output pixel where it is reduced, which is the antialiasing of PIL
and torchvision. grid_sample has none, and reads beyond the crop. Blur is the same product with Gaussian
weights. 6 S W (H + S) FLOPs: 0.4 M for an image of 32 pixels, 135 M for one of 224.

Jitter: brightness, contrast, saturation are all clamp(a x + b grey(x) + c mean(grey(x))), so a batch in which
every image has its own order takes four steps in all; only hue is apart, for the images whose turn it is.

Speed: 13,000 images of 32 pixels per CPU-second, two SimCLR views of each (one core, AMD EPYC Zen 5).
Random numbers come from the device's global generator: seed it, and the same call gives the same bits.
"""
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, pixels in [0,1]
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)          # columns of Params.jitter, entries of Params.order


class Params(NamedTuple):
    box: Tensor | None       # [n,4] int64  top, left, height, width of the crop
    flip: Tensor | None      # [n]   bool   mirror left-right
    jitter: Tensor | None    # [n,4] float  three factors, hue shift in turns; (1,1,1,0) = not jittered
    order: Tensor | None     # [n,4] int64  which jitter operation comes first, second, third, fourth
    grey: Tensor | None      # [n]   bool
    sigma: Tensor | None     # [n]   float  blur, in output pixels; 0 = not blurred
    solarise: Tensor | None  # [n]   bool


def unit(x):
    """uint8, or float already in [0,1] -> a new float32 tensor in [0,1]"""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"images must be [B,3,H,W], got {list(x.shape)}")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"images must be uint8, or float in [0,1], got {x.dtype}")
    return x.float() / (255 if x.dtype == torch.uint8 else 1)


def channels(values, x):
    return torch.tensor(values, device=x.device).view(3, 1, 1)


def normalise(x):
    return unit(x).sub_(channels(MEAN, x)).div_(channels(STD, x))


def denormalise(x):
    return (x * channels(STD, x) + channels(MEAN, x)).clamp(0, 1)


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
    """flip, p_jitter, grey, blur and solarise are probabilities, 0 = off and free; scale=None = no crop."""
    def rand(*shape):
        return torch.rand(*shape, device=device)

    factors = order = None
    if p_jitter:
        strength = torch.tensor(jitter, device=device)                                       # [4]
        same = torch.tensor([1., 1., 1., 0.], device=device)                                 # [4]
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


def some(f, x, chosen, *args):
    """f on the chosen images only, in place; args have a row per image too."""
    i = chosen.nonzero()[:, 0]
    if len(i):
        x[i] = f(x.index_select(0, i), *(a[i] for a in args))
    return x


def triangles(start, length, pixels, size, flip=None):
    """Weights [n,S,P] that resample the pixels from start to start + length, of P, to S = size pixels."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)                # [n,1,1]
    i = torch.arange(size, device=start.device).view(1, -1, 1) + .5            # [1,S,1] output pixel centres
    i = i if flip is None else torch.where(flip.view(-1, 1, 1), size - i, i)   # [n,S,1]
    j = torch.arange(pixels, device=start.device) + .5                         # [P]     input pixel centres
    step = length / size                                                       # [n,1,1] pixels per output
    w = (1 - (j - (start + i * step)).abs() / step.clamp(min=1)).clamp(min=0)  # [n,S,P]
    w = w * ((j > start) & (j < start + length))                               # [n,S,P] not from outside it
    return w / w.sum(2, keepdim=True)                                          # [n,S,P]


def gaussians(sigma, size):
    """Weights [n,S,S] of a blur with 2 (S // 20) + 1 taps, at least 3, reflected at the border."""
    radius = max(1, size // 20)                                       # SimCLR: side / 10 taps
    r = torch.arange(-radius, radius + 1, device=sigma.device)        # [K]
    w = torch.softmax(-r ** 2 / (2 * sigma[:, None] ** 2), 1)         # [n,K] exp(-r^2 / 2 sigma^2) / sum
    j = (torch.arange(size, device=sigma.device)[:, None] + r).abs()  # [S,K] -1 -> 1
    j = size - 1 - (size - 1 - j).abs()                               # [S,K] S -> S - 2
    n, k = w.shape
    return w.new_zeros(n, size, size).scatter_add_(2, j.expand(n, size, k), w[:, None].expand(n, size, k))


def separable(x, wy, wx):
    return wy[:, None] @ x @ wx[:, None].mT  # [n,3,S,S]


def luma(x):
    r, g, b = x.split(1, 1)                                    # [n,1,S,S]
    return (.299 * r).add_(g, alpha=.587).add_(b, alpha=.114)  # [n,1,S,S] ITU-R 601


def shift_hue(x, turns):
    """Move the HSV hue of x [n,3,S,S] by turns [n]; value (max) and chroma (max - min) stay.

    A channel is max up to 1/6 turn from its own hue (red 0, green 1/3, blue 2/3) and falls to min at 2/6.
    So a pixel is 1 + (g + b - r - min) / chroma sixths of a turn from red, on the green side if g > b.
    """
    r, g, b = x.unbind(1)                                                      # [n,S,S]
    top, low = x.amax(1), x.amin(1)                                            # [n,S,S]
    chroma = top - low                                                         # [n,S,S]
    h = torch.copysign(1 + (g + b - r - low) / chroma.clamp(min=1e-8), g - b)  # [n,S,S] -3..3
    h = h / 6 + turns.view(-1, 1, 1)                                           # [n,S,S] in turns
    d = h[:, None] - channels((0, 1 / 3, 2 / 3), x)                            # [n,3,S,S] from its own hue
    d = (d - d.round()).abs()                                                  # [n,3,S,S] the short way
    return top[:, None] - chroma[:, None] * (6 * d - 1).clamp(0, 1)            # [n,3,S,S]


def colour_jitter(x, factors, order):
    f, op = (v[..., None, None, None] for v in (factors.gather(1, order), order))  # [n,4,1,1,1] by turn
    a = torch.where(op == HUE, 1, f)                                               # of x
    b = torch.where(op == SATURATION, 1 - f, 0)                                    # of grey(x)
    c = torch.where(op == CONTRAST, 1 - f, 0)                                      # of mean(grey(x))
    for t in range(4):
        g = luma(x)  # [n,1,S,S]
        x = (a[:, t] * x).add_(b[:, t] * g + c[:, t] * g.mean((2, 3), keepdim=True)).clamp_(0, 1)
        some(shift_hue, x, (order[:, t] == HUE) & (factors[:, HUE] != 0), factors[:, HUE])
    return x


def apply_chunk(x, p, size):
    x, (height, width) = unit(x), x.shape[2:]
    if p.box is not None or p.flip is not None or (height, width) != (size, size):
        box = torch.tensor([[0, 0, height, width]], device=x.device) if p.box is None else p.box
        top, left, h, w = box.T
        x = separable(x, triangles(top, h, height, size), triangles(left, w, width, size, p.flip))
    if p.jitter is not None:
        x = colour_jitter(x, p.jitter, p.order)
    if p.grey is not None:
        some(luma, x, p.grey)
    if p.sigma is not None:
        some(lambda x, s: separable(x, gaussians(s, size), gaussians(s, size)), x, p.sigma > 0, p.sigma)
    if p.solarise is not None:
        some(lambda x: torch.where(x < 128 / 255, x, 1 - x), x, p.solarise)
    return normalise(x)


@torch.no_grad()
def apply(x, params, size):
    """x [B,3,H,W] uint8, or float in [0,1], with its params -> [B,3,size,size] float32, normalised"""
    # on a CPU: chunks of about 1 MB, so that the many passes stay in its cache
    chunk = max(1, 2 ** 16 // size ** 2 if x.device.type == "cpu" else len(x))
    out = torch.empty(len(x), 3, size, size, device=x.device)  # [B,3,S,S]
    with torch.autocast(x.device.type, enabled=False):
        for i in range(0, len(x), chunk):
            part = Params(*(None if p is None else p[i:i + chunk] for p in params))
            out[i:i + chunk] = apply_chunk(x[i:i + chunk], part, size)
    return out


def views(x, size=None, **options):
    """One view [B,3,size,size] of each image; call again for the next (multi-crop: a smaller size, scale)."""
    unit(x[:0])  # the ValueErrors come first
    params = draw(len(x), *x.shape[2:], device=x.device, **options)
    return apply(x, params, size or x.shape[2])


if __name__ == "__main__":
    torch.set_num_threads(1)
    x = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    torch.zeros(2 ** 22)  # freed: from now on malloc keeps what is freed, as it does in any training loop
    crop_flip, all_on = dict(p_jitter=0, grey=0), dict(blur=.55, solarise=.1)
    for name, options in dict(SimCLR={}, MAE=crop_flip, BYOL=all_on).items():
        for rounds in 2, 40:  # the first is the warm-up
            start = time.process_time()
            for _ in range(rounds):
                views(x, **options), views(x, **options)
        rate = rounds * len(x) / (time.process_time() - start)
        print(f"{name:6} two views each: {rate:6.0f} images per CPU-second")
