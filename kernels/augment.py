"""Augment: crop, flip, jitter, grey, blur, solarise and normalise images, each with its own parameters.

SimCLR: Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv 2002.05709 (appendix A).
BYOL: Grill et al., NeurIPS 2020, arXiv 2006.07733 (appendix B: blur, solarise, order of the operations).

    x [B,3,H,W] --/255--> crop, flip, resize --> jitter --> grey --> blur --> solarise --> (x - MEAN) / STD
      uint8               Wy @ x @ Wx.T          own order           G @ x @ G.T           [B,3,S,S] float32

Every operation is torchvision's, not rounded to 1/255 in between; grey has .299, not .2989; solarise starts
at .5, which rounds to 128. Resizing is PIL's: antialiased where the crop is reduced. The kernel: one pass.
Jitter adds one before it, for contrast: grey at its turn, summed over tiles. Blur adds two, one an axis.

FLOPs  8 Ky Kx a pixel, K = max(2, 2 H / S), twice that with jitter; 16 K with blur. Plain: 6 W (H + S) / S.
Bytes  The crop's (jitter: twice), and 4 a value of the view (blur: 20). Plain, op by op, SimCLR's views: 460.
Types  Computed and returned in PyTorch's default dtype.
"""
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton.knobs
    import triton.language as tl
except ImportError:
    triton = None                                                 # every call then runs in PyTorch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)          # ImageNet, pixels in [0,1]
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)                  # columns of jitter, entries of order
BLOCK = 256                                                       # output pixels of a program


class Params(NamedTuple):
    box: Tensor | None       # [n,4] int64  top, left, height, width of the crop, inside the image
    flip: Tensor | None      # [n]   bool   mirror left-right
    jitter: Tensor | None    # [n,4] float  three factors, hue shift in turns; (1,1,1,0) = not jittered
    order: Tensor | None     # [n,4] int64  with jitter: which operation comes first, second, third, fourth
    grey: Tensor | None      # [n]   bool
    sigma: Tensor | None     # [n]   float  blur, in output pixels; 0 = not blurred
    solarise: Tensor | None  # [n]   bool


# ---- reference: the definition

def unit(x):  # uint8, or float already in [0,1] -> a new tensor in [0,1]
    if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"images must be [B,3,H,W], uint8 or float in [0,1], got {list(x.shape)} {x.dtype}")
    return x.to(torch.get_default_dtype()) / (255 if x.dtype == torch.uint8 else 1)

def normalise(x):
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return unit(x).sub_(mean).div_(std)

def triangles(start, length, pixels, size, flip=None):
    """Weights [n,1,S,P] that resample the pixels from start to start + length, of P, to S = size pixels."""
    start, length = start.view(-1, 1, 1, 1), length.view(-1, 1, 1, 1)             # [n,1,1,1]
    i = torch.arange(size, device=start.device)[:, None] + .5                     # [S,1]     output centres
    i = i if flip is None else torch.where(flip.view(-1, 1, 1, 1), size - i, i)   # [n,1,S,1]
    j = torch.arange(pixels, device=start.device) + .5                            # [P]       input centres
    step = length / size                                                          # [n,1,1,1] inputs an output
    w = (1 - (j - (start + i * step)).abs() / step.clamp(min=1)).clamp(min=0)     # [n,1,S,P]
    w = w * ((j > start) & (j < start + length))                                  # [n,1,S,P] none outside it
    return w / w.sum(3, keepdim=True)

def blur(x, sigma):
    (n, _, size, _), radius = x.shape, min(max(1, x.shape[3] // 20), x.shape[3] - 1)  # side / 10 taps
    r = torch.arange(-radius, radius + 1, device=x.device)                        # [K]
    w = torch.softmax(-r ** 2 / (2 * sigma[:, None] ** 2), 1)                     # [n,K]     exp(-r^2/2 s^2)
    j = (torch.arange(size, device=x.device)[:, None] + r).abs()                  # [S,K]     reflect -1 to 1
    j = size - 1 - (size - 1 - j).abs()                                           # [S,K]     and S to S - 2
    j, w = (v.expand(n, 1, size, -1) for v in (j, w[:, None, None]))              # [n,1,S,K]
    g = w.new_zeros(n, 1, size, size).scatter_add_(3, j, w)                       # [n,1,S,S]
    return g @ x @ g.mT

def luma(x):
    r, g, b = x.split(1, 1)                                                       # [n,1,S,S]
    return (.299 * r).add_(g, alpha=.587).add_(b, alpha=.114)                     # [n,1,S,S] ITU-R 601

def shift_hue(x, turns):
    """HSV. A channel is max up to 1/6 turn from its hue (red 0, green 1/3, blue 2/3), and min from 2/6 on."""
    r, g, b = x.unbind(1)                                                         # [n,S,S]
    top, low = x.amax(1), x.amin(1)                                               # [n,S,S]   both stay
    h = 1 + (g + b - r - low) / (top - low).clamp(min=1e-8)                       # [n,S,S]   sixths from red
    h = torch.copysign(h, g - b) / 6 + turns.view(-1, 1, 1)                       # [n,S,S]   turns to green
    d = h[:, None] - torch.arange(3, device=x.device).view(3, 1, 1) / 3           # [n,3,S,S] from its hue
    d = (d - d.round()).abs()                                                     # [n,3,S,S] the short way
    return top[:, None] - (top - low)[:, None] * (6 * d - 1).clamp(0, 1)

def some(f, x, chosen, *args):
    """f on the chosen images only, in place; args have a row per image too."""
    if chosen is not None and len(i := chosen.nonzero()[:, 0]):
        x[i] = f(x.index_select(0, i), *(a[i] for a in args))


def apply_reference(x, p, size):
    x, (H, W) = unit(x), x.shape[2:]
    if p.box is not None or p.flip is not None or (H, W) != (size, size):
        top, left, h, w = (torch.tensor([[0, 0, H, W]], device=x.device) if p.box is None else p.box).T
        wy, wx = triangles(top, h, H, size), triangles(left, w, W, size, p.flip)
        x = wy @ x @ wx.mT                                                        # [n,3,S,S]
    if p.jitter is not None:
        f, op = (v.view(-1, 4, 1, 1, 1) for v in (p.jitter.gather(1, p.order), p.order))  # a column a turn
        a = torch.where(op == HUE, 1, f)                                          # of x
        b = torch.where(op == SATURATION, 1 - f, 0)                               # of grey(x)
        c = torch.where(op == CONTRAST, 1 - f, 0)                                 # of mean(grey(x))
        for t in range(4):
            g = luma(x)                                                           # [n,1,S,S]
            x = (a[:, t] * x).add_(b[:, t] * g + c[:, t] * g.mean((2, 3), keepdim=True)).clamp_(0, 1)
            some(shift_hue, x, (p.order[:, t] == HUE) & (p.jitter[:, HUE] != 0), p.jitter[:, HUE])
    some(luma, x, p.grey)
    some(blur, x, None if p.sigma is None else p.sigma > 0, p.sigma)
    some(lambda x: torch.where(x < .5, x, 1 - x), x, p.solarise)
    return normalise(x)


# ---- kernels

if triton:
    @triton.jit
    def _tap(k, K: tl.constexpr, i, start, length, P, sigma, S: tl.constexpr, ACC: tl.constexpr):
        """The k-th of the K pixels that an output pixel i may see, and its weight"""
        if sigma is not None:                                     # as blur
            r = (i * 0 + k - K // 2).to(ACC)                      # [BLOCK]
            return S - 1 - tl.abs(S - 1 - tl.abs(i + k - K // 2)), tl.exp(-r * r / (2 * sigma * sigma))
        else:                                                     # as triangles
            step = tl.full((1,), length, ACC) / S                 # [1]
            reach = tl.maximum(step, 1.)                          # [1]
            centre = (i.to(ACC) + .5) * step                      # [BLOCK]  from start, as j
            j = tl.floor(centre - reach + .5).to(tl.int64) + k    # [BLOCK]
            w = tl.maximum(1 - tl.abs(j.to(ACC) + .5 - centre) / reach, 0.)
            inside = (j >= 0) & (j < length) & (start + j >= 0) & (start + j < P)
            return start + j, tl.where(inside, w, 0.)

    @triton.jit
    def _luma(r, g, b):
        return .299 * r + .587 * g + .114 * b

    @triton.jit
    def _forward_kernel(
            x, out, mean, box, flip, jitter, order, grey, sigma, solarise, sn, sc, sh, sw, H: tl.constexpr,
            W: tl.constexpr, S: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, BLOCK: tl.constexpr,
            END: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr, CONTRAST: tl.constexpr,
            SATURATION: tl.constexpr, HUE: tl.constexpr):
        ACC: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
        n = (tl.program_id(0) // tl.cdiv(S * S, BLOCK)).to(tl.int64)              # the image
        i = tl.program_id(0) % tl.cdiv(S * S, BLOCK) * BLOCK + tl.arange(0, BLOCK)
        pixel = tl.minimum(i, S * S - 1)                          # [BLOCK]  the last repeated
        row, col = pixel // S, pixel % S
        top, left, h, w = (0, 0, H, W) if box is None else [tl.load(box + 4 * n + c) for c in (0, 1, 2, 3)]
        if flip is not None:
            col = tl.where(tl.load(flip + n), S - 1 - col, col)
        if sigma is not None:
            sigma = tl.maximum(tl.load(sigma + n).to(ACC), 1e-8)  # at 0 only the middle tap has a weight
        total = tl.zeros((BLOCK,), ACC)
        r, g, b = total, total, total
        for ky in range(KY):
            y, wy = _tap(ky, KY, row, top, h, H, sigma, S, ACC)
            for kx in range(KX):
                z, wx = _tap(kx, KX, col, left, w, W, sigma, S, ACC)
                at, v = x + n * sn + y * sh + z * sw, wy * wx
                r += v * tl.load(at, v > 0, 0).to(ACC)
                g += v * tl.load(at + sc, v > 0, 0).to(ACC)
                b += v * tl.load(at + sc + sc, v > 0, 0).to(ACC)
                total += v
        total *= 255 if x.dtype.element_ty == tl.uint8 else 1
        r, g, b = r / total, g / total, b / total
        if jitter is not None:
            m = 0. if mean is None else tl.load(mean + n)
            t = tl.arange(0, 4)                                   # [4]      contrast's turn, or all four
            turns = tl.sum(tl.where(tl.load(order + 4 * n + t) == CONTRAST, t, 0)) if END == "mean" else 4
            for t in range(turns):
                op = tl.load(order + 4 * n + t)
                f = tl.load(jitter + 4 * n + op).to(ACC)
                a = tl.where(op == HUE, 1., f)
                k = (1 - a) * tl.where(op == CONTRAST, m, tl.where(op == SATURATION, _luma(r, g, b), 0.))
                r, g, b = [tl.clamp(a * v + k, 0., 1.) for v in (r, g, b)]
                if (op == HUE) & (f != 0):                        # as shift_hue
                    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
                    d = 1 + (g + b - r - low) / tl.maximum(high - low, 1e-8)
                    d = tl.where(g < b, -d, d) / 6 + f
                    r, g, b = [tl.abs(v - tl.floor(v + .5)) for v in (d, d - 1 / 3, d - 2 / 3)]
                    r, g, b = [high - (high - low) * tl.clamp(6 * v - 1, 0., 1.) for v in (r, g, b)]
        y = _luma(r, g, b)
        if END == "mean":
            tl.store(out + tl.program_id(0), tl.sum(tl.where(i < S * S, y, 0.)))
        else:
            if grey is not None:
                r, g, b = [tl.where(tl.load(grey + n), y, v) for v in (r, g, b)]
            if solarise is not None:
                r, g, b = [tl.where(tl.load(solarise + n) & (v >= .5), 1 - v, v) for v in (r, g, b)]
            if END == "view":
                r, g, b = (r - MEAN[0]) / STD[0], (g - MEAN[1]) / STD[1], (b - MEAN[2]) / STD[2]
            for c in tl.static_range(3):
                tl.store(out + (3 * n + c) * (S * S) + pixel, (r, g, b)[c])

    def _forward_triton(x, p, size):
        p, mean = Params(*(v if v is None else v.contiguous() for v in p)), None
        KY, KX = (max(2, triton.cdiv(2 * s, size)) for s in x.shape[2:])          # triangles are 2 steps wide
        K, tiles = 2 * min(max(1, size // 20), size - 1) + 1, triton.cdiv(size ** 2, BLOCK)
        out = torch.empty(len(x), 3, size, size, device=x.device)
        crop = p if p.sigma is None else p._replace(sigma=None, solarise=None)
        blur = Params(*[None] * 5, p.sigma, None)
        def launch(x, out, p, KY, KX, END):
            _forward_kernel[len(x) * tiles,](
                x, out, mean, *p, *x.stride(), *x.shape[2:], size, KY, KX, BLOCK, END, MEAN, STD, CONTRAST,
                SATURATION, HUE, enable_fp_fusion=True)
        with torch.cuda.device_of(x):
            if p.jitter is not None:
                launch(x, sums := torch.empty(len(x), tiles, device=x.device), crop, KY, KX, "mean")
                mean = sums.sum(1) / size ** 2
            launch(x, out, crop, KY, KX, "view" if p.sigma is None else "pixels")
            if p.sigma is not None:
                launch(out, half := torch.empty_like(out), blur, 1, K, "pixels")
                launch(half, out, blur._replace(solarise=p.solarise), K, 1, "view")
        return out


# ---- operator and public

@torch.library.custom_op(__name__.replace(".", "_") + "::augment", mutates_args=())
def _forward(x: Tensor, params: list[Tensor | None], size: int, kernel: bool) -> Tensor:
    if kernel:
        return _forward_triton(x, Params(*params), size)
    chunk = max(1, 2 ** 16 // size ** 2 if x.is_cpu else len(x))  # CPU: about 1 MB, which its cache holds
    out = torch.empty(len(x), 3, size, size, device=x.device)     # [B,3,S,S]
    with torch.autocast(x.device.type, enabled=False):
        for i in range(0, len(x), chunk):
            part = Params(*(p if p is None else p[i:i + chunk] for p in params))
            out[i:i + chunk] = apply_reference(x[i:i + chunk], part, size)
    return out

_forward.register_fake(lambda x, params, size, _: torch.empty(len(x), 3, size, size, device=x.device))
DEVICES = () if not triton else ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)  # ROCm: cuda


@torch.no_grad()
def apply(x, params, size, impl="auto"):
    """x [B,3,H,W] uint8, or float in [0,1], with its params -> [B,3,size,size] float32, normalised

    impl: "triton" runs the kernel or says why it cannot; "auto" runs it on a GPU only. x gets no gradient.
    """
    unit(x[:0])                                                   # the ValueErrors come first
    if any(p is not None and len(p) != len(x) for p in params):
        raise ValueError(f"params need a row for each of the {len(x)} images")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and x.device.type not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {x.device.type}: {why}')
    return _forward(x, [*params], size, impl == "triton" or impl == "auto" and x.is_cuda and bool(DEVICES))
