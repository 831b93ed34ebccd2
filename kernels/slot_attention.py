"""Slot attention's competition: inputs choose among slots, and a slot takes the mean of what chose it.

Object-Centric Learning with Slot Attention. Locatello et al., NeurIPS 2020, arXiv 2006.15055, Eq. 1 and 2.

    a_sn = exp(scale q_s . k_n) / sum_t exp(scale q_t . k_n)           over slots t
    u_s  = sum_n (a_sn + eps) v_n / sum_n (a_sn + eps)                 over inputs n

    q [B,S,D], k v [B,N,D] --tiles of a--> sums of (a + eps) v and a + eps --add, divide--> u [B,S,D]
    u, du    --the same tiles again--> dx --> dk, dv [B,N,D], sums of dx k --add--> dq [B,S,D]

A tile has all slots: the softmax stays in it, one pass each way. No atomics: two runs agree in every bit.

FLOPs  4BNSD forward, 10BNSD backward, S padded to 16, 32, 64, 128: PyTorch's GEMMs, and the logits again.
Bytes  k, v forward; k, v, dk, dv backward; S (D + 1) fp32 numbers a program. [B,S,N] only as maps.
Saved  q, k, v, masks and, in fp32, u and the sums of a + eps. Recomputed: a.
Types  Sums are fp32 (fp64 for fp64); in fp16 eps should be 4e-9 or more, or it is lost beside larger weights.
       fp32 GEMMs use TF32 where torch.set_float32_matmul_precision allows it.
"""
import math

import torch
from torch import Tensor

try:
    import triton.knobs
    import triton.language as tl
except ImportError:
    triton = None                                                 # every call then runs in PyTorch

PROGRAMS, TINY = 512, 2.**-80                                     # fill a GPU; a slot without mass: 0 / TINY


# ---- reference: the definition

def slot_attention_reference(q, k, v, mask=None, slot_mask=None, eps=1e-8, scale=None, maps=False):
    _, _, v, a, w, total = _weights(q, k, v, mask, slot_mask, eps, scale or q.shape[2]**-.5)
    u = (w / total).to(v.dtype) @ v                               # [B,S,D]  Eq. 2, a mean over inputs
    return (u, a) if maps else u


def _weights(q, k, v, mask, slot_mask, eps, scale):
    off = torch.zeros_like(q[:, :, :1], dtype=torch.bool) if slot_mask is None else slot_mask[:, :, None]
    hidden = torch.zeros_like(k[:, :, :1], dtype=torch.bool) if mask is None else mask[:, :, None]
    q, k, v = q.masked_fill(off, 0), k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)           # may be NaN
    x = (q @ k.mT).to(_acc(q)).masked_fill(off, -math.inf)        # [B,S,N]
    a = (x * scale).softmax(1).masked_fill(off | hidden.mT, 0)    # [B,S,N]  Eq. 1, over slots
    w = (a + eps).masked_fill(off | hidden.mT, 0)                 # [B,S,N]
    return q, k, v, a, w, w.sum(2, keepdim=True) + TINY           #          of w [B,S,1]


def _acc(x):
    return torch.promote_types(x.dtype, torch.float32)


# ---- kernels: a tile is [BN,BS], inputs by slots; c = k_n . q_s, exp(scale c) = 2^(c unit)

if triton:
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)      # TRITON_INTERPRET=1: kernels on the CPU

    @triton.jit
    def _mm(a, b, acc, PREC: tl.constexpr):
        if INTERPRET:                                             # tl.dot of bf16 works on raw bits there
            return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(acc.dtype)
        return tl.dot(a, b, acc, input_precision=PREC, out_dtype=acc.dtype)

    @triton.jit
    def _round(x, dtype: tl.constexpr):
        if INTERPRET and dtype == tl.bfloat16:                    # it truncates; this is nearest even
            bits = x.to(tl.uint32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return x.to(dtype)

    @triton.jit
    def _live(mask, b, row, n):                                   # in fp64 int32: Triton 3.8 breaks on bytes
        return row < n if mask is None else (row < n) & (tl.load(mask + b * n + row, row < n, 1) == 0)

    @triton.jit
    def _rows(z, row, live, d, stride, D: tl.constexpr):
        return tl.load(z + row.to(tl.int64) * stride + d, live & (d < D), 0.)

    @triton.jit
    def _softmax(c, seen, on, unit):
        top = tl.max(tl.where(on, c, -float("inf")), 1)[:, None]  # [BN,1]
        e = tl.exp2(tl.where(on, c - top, -float("inf")) * unit)  # [BN,BS]  padding takes no mass
        return tl.where(seen, e / (tl.sum(e, 1) + 1e-30)[:, None], 0.)            # [BN,BS]  Eq. 1; all off: 0

    @triton.jit
    def _forward_kernel(q, k, v, sums, mask, slot_mask, maps, S, N, splits, kb, kn, vb, vn, eps: tl.float64,
                        scale: tl.float64, D: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
                        BD: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = sums.dtype.element_ty
        part, s, d = tl.program_id(0).to(tl.int64), tl.arange(0, BS), tl.arange(0, BD)
        b, on = part // splits, _live(slot_mask, part // splits, s, S)            # image, [BS]
        qs = _rows(q + b * S * D, s[:, None], on[:, None], d, D, D)               # [BS,BD]
        eps, unit = tl.full((1, 1), eps, ACC), tl.full((1, 1), scale * 1.4426950408889634, ACC)
        num, den = tl.zeros((BS, BD), ACC), tl.zeros((BS,), ACC)  # sums over n of (a + eps) v, of a + eps
        for start in range(tl.program_id(0) % splits * BN, N, splits * BN):
            n = start + tl.arange(0, BN)[:, None]                 # [BN,1]
            seen = _live(mask, b, n, N)                           # [BN,1]
            c = _mm(_rows(k + b * kb, n, seen, d, kn, D), qs.T, tl.zeros((BN, BS), ACC), PREC)
            a = _softmax(c, seen, on, unit)                       # [BN,BS]
            if maps is not None:
                tl.store(maps + (b * S + s) * N + n, a, (n < N) & (s < S))
            w = _round(tl.where(seen & on, (a + eps) * 16384, 0.), qs.dtype)      # 2^14: normal in fp16
            num = _mm(w.T, _rows(v + b * vb, n, seen, d, vn, D), num, PREC)
            den += tl.sum(w.to(ACC), 0)                           # of w as rounded: the weights add up to 1
        at = sums + (part * S + s) * (D + 1)                      # [BS]
        tl.store(at[:, None] + d, num / 16384, (s < S)[:, None] & (d < D))
        tl.store(at + D, den / 16384 + tl.where(part % splits == 0, 2.**-80, 0.), s < S)          # TINY, once

    @triton.jit
    def _backward_kernel(q, k, v, dq, mask, slot_mask, u, den, du, da, dk, dv, S, N, splits, kb, kn, vb, vn,
                         eps: tl.float64, scale: tl.float64, D: tl.constexpr, BS: tl.constexpr,
                         BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = dq.dtype.element_ty
        part, s, d = tl.program_id(0).to(tl.int64), tl.arange(0, BS), tl.arange(0, BD)
        b, on = part // splits, _live(slot_mask, part // splits, s, S)            # image, [BS]
        own, here = (b * S + s)[:, None] * D + d, on[:, None] & (d < D)           # [BS,BD]
        qs, du_s = tl.load(q + own, here, 0.), tl.load(du + own, here, 0.)        # du: fp32 of q's precision
        delta, r = tl.sum(du_s * tl.load(u + own, here, 0.), 1), 1 / tl.load(den + b * S + s, on, 1.)
        eps, unit = tl.full((1, 1), eps, ACC), tl.full((1, 1), scale * 1.4426950408889634, ACC)
        du_s, scale = du_s.to(qs.dtype), tl.full((1, 1), scale, ACC)
        dqs, zero = tl.zeros((BS, BD), ACC), tl.zeros((BN, BD), ACC)
        for start in range(tl.program_id(0) % splits * BN, N, splits * BN):
            n = start + tl.arange(0, BN)[:, None]                 # [BN,1]
            seen = _live(mask, b, n, N)                           # [BN,1]
            k_n = _rows(k + b * kb, n, seen, d, kn, D)            # [BN,BD]
            v_n = _rows(v + b * vb, n, seen, d, vn, D)            # [BN,BD]
            a = _softmax(_mm(k_n, qs.T, tl.zeros((BN, BS), ACC), PREC), seen, on, unit)           # [BN,BS]
            g = (_mm(v_n, du_s.T, tl.zeros((BN, BS), ACC), PREC) - delta) * (a * r)               # a r <= 1
            g += 0 if da is None else a * tl.load(da + (b * S + s) * N + n, seen & on, 0.)
            dx = _round((g - a * tl.sum(g, 1)[:, None]) * scale, qs.dtype)        # [BN,BS]
            w = _round(tl.where(seen & on, (a + eps) * r * 16384, 0.), qs.dtype)  # [BN,BS]
            dqs = _mm(dx.T, k_n, dqs, PREC)                       # [BS,BD]
            at, inside = (b * N + n) * D + d, (n < N) & (d < D)   # [BN,BD]
            tl.store(dk + at, _round(_mm(dx, qs, zero, PREC), qs.dtype), inside)
            tl.store(dv + at, _round(_mm(w, du_s, zero, PREC) / 16384, qs.dtype), inside)
        tl.store(dq + (part * S + s)[:, None] * D + d, dqs, (s < S)[:, None] & (d < D))

    def _forward_triton(q, k, v, mask, slot_mask, eps, scale, maps):
        a = torch.empty(*q.shape[:2], k.shape[1] if maps else 0, dtype=_acc(q), device=q.device)
        sums = _launch(_forward_kernel, 1, eps, scale, q, k, v, mask, slot_mask, a)
        return sums[:, :, :-1] / sums[:, :, -1:], sums[:, :, -1:].contiguous(), a

    def _backward_triton(du, da, q, k, v, mask, slot_mask, u, den, eps, scale):
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        dq = _launch(_backward_kernel, 0, eps, scale, q, k, v, mask, slot_mask, u, den, du, da, dk, dv)
        return dq.to(q.dtype), dk, dv

    def _launch(kernel, extra, eps, scale, q, k, v, *rest):
        q, *rest = (None if x is None or not x.numel() else x.contiguous() for x in (q, *rest))
        rest = (x.int() if x is not None and x.dtype == torch.bool and k.itemsize == 8 else x for x in rest)
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        (B, S, D), N, strides = q.shape, k.shape[1], (*k.stride()[:2], *v.stride()[:2])
        parts = min(triton.cdiv(N, 64), triton.cdiv(PROGRAMS, B))
        sums = q.new_empty(B, parts, S, D + extra, dtype=_acc(q))
        tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32" and not torch.version.hip
        with torch.cuda.device_of(q):
            kernel[B * parts,](q, k, v, sums, *rest, S, N, parts, *strides, eps, scale, enable_fp_fusion=True,
                               **_tiles(S, D, q.dtype.itemsize, "tf32" if tf32 else "ieee"))
        return sums.sum(1)


def _tiles(S, D, itemsize, prec):
    """A table, no tuner. None spills on sm_80, 90, 100, gfx90a, gfx942; S > 32 may, in fp32 or at D < 32."""
    BS, BD = (max(16, 1 << (n - 1).bit_length()) for n in (S, D))
    fast, size = itemsize < (8 if prec == "tf32" else 4), BS * BD
    BN = 64 if fast and size <= 1024 else 32 if itemsize == 2 and size <= 4096 and BS < 128 else 16
    num_warps = 8 if itemsize > 2 and BN == 16 or BD > 128 and BN == 32 else 4
    return dict(D=D, BS=BS, BD=BD, BN=BN, PREC=prec, num_warps=num_warps, num_stages=1 if BN == 16 else 2)


# ---- operators: what PyTorch runs on a device that has no kernel

@torch.library.custom_op(__name__.replace(".", "_") + "::slot_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slot_mask: Tensor | None, eps: float,
             scale: float, maps: bool) -> tuple[Tensor, Tensor, Tensor]:
    _, _, v, a, w, total = _weights(*(x.to(_acc(x)) for x in (q, k, v)), mask, slot_mask, eps, scale)
    return w / total @ v, total, a if maps else a.new_empty(*a.shape[:2], 0)

@torch.library.custom_op(__name__.replace(".", "_") + "::slot_attention_backward", mutates_args=())
def _backward(du: Tensor, da: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
              slot_mask: Tensor | None, u: Tensor, den: Tensor, eps: float,
              scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q32, k32, v32 = (x.to(_acc(x)) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):            # the caller may be inside of one
        q32, k32, v32, a, w, total = _weights(q32, k32, v32, mask, slot_mask, eps, scale)
        g = a / total * (du @ v32.mT - (du * u).sum(2, keepdim=True)) + (a * da if da.numel() else 0)
        dx = (g - a * g.sum(1, keepdim=True)) * scale             # [B,S,N]
        return tuple(x.to(q.dtype) for x in (dx @ k32, dx.mT @ q32, (w / total).mT @ du))

def _save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.mark_non_differentiable(output[1])

def _gradient(ctx, du, _, da):
    return *_backward(du, da, *ctx.saved_tensors, ctx.eps, ctx.scale), *[None] * 5

def _no_second(ctx, *grads):
    raise NotImplementedError('the kernel has no second derivative: use impl="reference"')

_forward.register_fake(lambda q, k, v, mask, slot_mask, eps, scale, maps: tuple(
    q.new_empty(*q.shape[:2], n, dtype=_acc(q)) for n in (q.shape[2], 1, k.shape[1] if maps else 0)))
_backward.register_fake(lambda du, da, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
_forward.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second)
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _forward.register_kernel(_device, _forward_triton)
    _backward.register_kernel(_device, _backward_triton)

# ---- public

def slot_attention(q, k, v, mask=None, slot_mask=None, eps=1e-8, scale=None, maps=False, impl="auto"):
    """u [B,S,D] of slots q [B,S,D], inputs k, v [B,N,D]; with maps=True (u, a): a fp32 [B,S,N], before eps.

    Both have gradients. mask [B,N] bool: True = hidden, never read, a = 0. slot_mask [B,S] bool: True = off,
    a and u are 0. So is u of a slot without mass: all inputs hidden, or eps = 0, none near. scale: D^-1/2.
    impl: "triton" runs the kernel, whose tiles hold D <= 512 (RTX 256), 256, 128, 64 for S <= 16, 32, 64, 128
    (half in fp32, a quarter in fp64), or says why it cannot; "auto" runs it where it can, else the same
    formulas in PyTorch; "reference" is plain autograd, the one with second derivatives. Autocast casts.
    """
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        low = q.dtype if q.dtype == torch.float64 else torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return slot_attention(*(x.to(low) for x in (q, k, v)), mask, slot_mask, eps, scale, maps, impl)
    if not (q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2] and q.numel()
            and k.numel() and q.dtype == k.dtype == v.dtype and all(m is None or m.dtype == torch.bool
            and m.shape == x.shape[:2] for m, x in ((mask, k), (slot_mask, q)))):
        got = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (q, k, v, mask, slot_mask) if x is not None)
        raise ValueError(f"q must be [B,S,D], k, v [B,N,D] alike, none empty, masks bool [B,N], [B,S]: {got}")
    (S, D), scale = q.shape[1:], q.shape[2]**-.5 if scale is None else scale
    if not (0 <= eps <= 1 and scale > 0) or impl != "reference" and any(map(torch.is_tensor, (eps, scale))):
        raise ValueError('eps must be in [0,1] and scale positive, numbers unless impl="reference", got '
                         f"{eps} and {scale}")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    fits = S <= 128 and D <= 1024 // q.dtype.itemsize >> (S > 16) + (S > 32) + (S > 64)
    if S <= 16 and 2 * D > 1024 // q.dtype.itemsize and kind == "cuda" and not torch.version.hip:
        fits &= torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin >= 7 * 2**14
    if impl == "triton" and not (fits and kind in DEVICES):
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise (RuntimeError(f'impl="triton" cannot run on {kind}: {why}') if fits else
               ValueError(f'impl="triton" does not hold {S} slots of {D} numbers in {q.dtype}'))
    if impl == "reference" or not fits:
        return slot_attention_reference(q, k, v, mask, slot_mask, eps, scale, maps)
    u, _, a = _forward(q, k, v, mask, slot_mask, eps, scale, maps)
    return (u.to(v.dtype), a) if maps else u.to(v.dtype)
