"""Attention without its N x M matrix, and in the same pass the softmax rows of the queries that you name.

FlashAttention-2. Dao, ICLR 2024, arXiv 2307.08691, Algorithms 1 and 2. DINO (2104.14294) draws the row of
[CLS], AttMask (2203.12719) masks by it. Without rows, F.scaled_dot_product_attention is the production path.

    out_i = sum_j P_ij v_j, P_i = softmax of s_ij = scale q_i . k_j over the keys j that i sees

    q [B,H,N,d], k, v [B,H,M,d] --tiles of S--> running max, sum, P v --> out [B,H,N,d], norm [B,H,2,N]
                                     '--these rows are kept, divided at the end--> maps [B,H,R,M]
    all that, dout --tiles of S again--> dS = P * (dout v^T - delta), delta = rowsum(out * dout)
                     blocks of queries: dq = scale dS k; blocks of keys: dk = scale dS^T q, dv = P^T dout

There are no atomics: two runs agree in every bit. norm keeps the maximum of q_i . k_j and 1 / the sum apart:
as one fp32 log-sum-exp, at logits of 1e4, it costs P 1e-3. No speed is quoted: none was measured.

FLOPs  4NMd a head forward, 14NMd backward (plain PyTorch 8; S twice more, dout v^T once). Causal: half of it.
Bytes  q, k, v, out, their gradients, 3N fp32 numbers a head. Plain PyTorch in bf16 with its softmax in fp32,
       counted op by op, moves 72 bytes per element of S and keeps 6 between forward and backward.
Saved  q, k, v, padding, out and norm. Recomputed: S.
Types  Sums are fp32 (fp64 for fp64). fp32 GEMMs use TF32 where torch.set_float32_matmul_precision allows it.
"""
import math

import torch
from torch import Tensor

try:
    import triton.knobs
    import triton.language as tl
except ImportError:
    triton = None                                                 # every call then runs in PyTorch

# ---- reference: the definition; i sees j <= i + shift

def attention_reference(q, k, v, causal=False, padding=None, rows=None, scale=None):
    p, _, v = _softmax(q, k, v, padding, k.shape[2] - causal * q.shape[2], scale or q.shape[3]**-.5)
    out = p.to(v.dtype) @ v                                       # [B,H,N,d]
    return out if rows is None else (out, p[:, :, rows].detach())

def _softmax(q, k, v, padding, shift, scale):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(shift + 1)    # [N,M]
    if padding is not None:
        k, v = (x.masked_fill(padding[:, None, :, None], 0) for x in (k, v))
        hidden = hidden | padding[:, None, None]                  # [B,1,N,M]
    s = ((q @ k.mT).to(_acc(q)) * scale).masked_fill(hidden, -math.inf)           # [B,H,N,M]
    return s.softmax(-1).masked_fill(s == -math.inf, 0), k, v     # 0, not NaN, where i sees no key

def _acc(q):
    return torch.promote_types(q.dtype, torch.float32)

# ---- kernels: c = q_i . k_j, scale times log2(e), so that exp(s) = 2^(c scale)

if triton:
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)      # TRITON_INTERPRET=1: kernels on the CPU
    LN2 = tl.constexpr(math.log(2))

    @triton.jit
    def _mm(a, b, acc, PREC: tl.constexpr):
        if INTERPRET:                                             # bf16: raw bits; fp32: a.b and b.a differ
            return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(acc.dtype)
        return tl.dot(a, b, acc, input_precision=PREC, out_dtype=acc.dtype)

    @triton.jit
    def _round(x, dtype: tl.constexpr):
        if INTERPRET and dtype == tl.bfloat16:                    # it truncates; this is nearest even
            bits = x.to(tl.uint32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return x.to(dtype)

    @triton.jit
    def _block(n, H, BM: tl.constexpr):
        head = (tl.program_id(0) // tl.cdiv(n, BM)).to(tl.int64)  # b H + h
        at = tl.program_id(0) % tl.cdiv(n, BM) * BM + tl.arange(0, BM)
        return tl.minimum(at, n - 1), head, head // H, head % H   # [BM]     the last repeated

    @triton.jit
    def _rows(x, row, there, stride, d, D: tl.constexpr):
        return tl.load(x + row.to(tl.int64)[:, None] * stride + d, there[:, None] & (d < D), 0.)

    @triton.jit
    def _there(pad, b, at, n):                                    # pad int32: Triton 3.8 fails at fp64, bytes
        return at < n if pad is None else tl.load(pad + b * n + at, at < n, 1) == 0

    @triton.jit
    def _forward_kernel(q, k, v, pad, out, norm, maps, slot, R, H, N, M, shift, qb, qh, qn, kb, kh, kn,
                        vb, vh, vn, scale: tl.float64, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                        BD: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = norm.dtype.element_ty
        row, head, b, h = _block(N, H, BM)                        # [BM]     i
        d, scale = tl.arange(0, BD), tl.full((1,), scale, ACC)    # [BD], [1]  fp64 until here
        q, k, v = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh
        qi = _rows(q, row, row < N, qn, d, D)                     # [BM,BD]
        top = tl.full((BM,), -1e30, ACC)                          # [BM]     max of c over the j seen so far
        total = tl.full((BM,), 1e-30, ACC)                        # [BM]     sum of exp(s_ij - scale top_i)
        acc, zero = tl.zeros((BM, BD), ACC), tl.zeros((BM, BN), ACC)              # [BM,BD]  of that times v_j
        for start in range(0, tl.minimum(tl.max(row) + shift + 1, M), BN):
            col = start + tl.arange(0, BN)                        # [BN]     j
            there = _there(pad, b, col, M)                        # [BN]
            kj, vj = _rows(k, col, there, kn, d, D), _rows(v, col, there, vn, d, D)   # [BN,BD], [BN,BD]
            c = tl.where(there & (col <= row[:, None] + shift), _mm(qi, kj.T, zero, PREC), -float("inf"))
            if slot is not None:
                r = tl.load(slot + row)[:, None]                  # [BM,1]   where i is in rows, or -1
                tl.store(maps + (head * R + r) * M + col, c, (r >= 0) & (col < M))
            old, top = top, tl.maximum(top, tl.max(c, 1))
            keep, p = tl.exp2((old - top) * scale), tl.exp2((c - top[:, None]) * scale)       # [BM], [BM,BN]
            total = total * keep + tl.sum(p, 1)
            acc = _mm(_round(p, vj.dtype), vj, acc * keep[:, None], PREC)
        tl.store(norm + head * 2 * N + row, top)
        tl.store(norm + head * 2 * N + N + row, 1 / total)
        tl.store(out + (head * N + row)[:, None] * D + d, _round(acc / total[:, None], qi.dtype), d < D)

    @triton.jit
    def _backward_kernel(x, y, u, w, pad, out, norm, delta, dx, dy, N, H, n, m, shift, xb, xh, xn, yb, yh, yn,
                         ub, uh, un, wb, wh, wn, scale: tl.float64, KEYS: tl.constexpr, D: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
        # x, y, u, w: q, dout, k, v, and dx is dq; with KEYS k, v, q, dout, and dx, dy are dk, dv
        ACC: tl.constexpr = norm.dtype.element_ty
        own, head, b, h = _block(n, H, BM)                        # [BM]     i, or j if KEYS
        d, scale = tl.arange(0, BD), tl.full((1,), scale, ACC)    # [BD], [1]  fp64 until here
        x, y, u, w = x + b * xb + h * xh, y + b * yb + h * yh, u + b * ub + h * uh, w + b * wb + h * wh
        norm, delta, at = norm + head * 2 * N, delta + head * N, (head * n + own)[:, None] * D + d
        mine = _there(pad if KEYS else None, b, own, n)           # [BM]
        xi, yi = _rows(x, own, mine, xn, d, D), _rows(y, own, mine, yn, d, D)     # [BM,BD]  q dout, or k v
        dxi, dyi, zero = tl.zeros((BM, BD), ACC), tl.zeros((BM, BD), ACC), tl.zeros((BM, BN), ACC)
        if not KEYS:
            delta_i = tl.sum(tl.load(out + at, d < D, 0.).to(ACC) * yi.to(ACC), 1)[:, None]       # [BM,1]
            tl.store(delta + own[:, None], delta_i)
        first = tl.maximum(tl.min(own) - shift, 0) if KEYS else 0
        for start in range(first, m if KEYS else tl.minimum(tl.max(own) + shift + 1, m), BN):
            other = start + tl.arange(0, BN)                      # [BN]     j, or i if KEYS
            there = _there(None if KEYS else pad, b, other, m)    # [BN]
            uj, wj = _rows(u, other, there, un, d, D), _rows(w, other, there, wn, d, D)       # [BN,BD]
            i, j = other[None] if KEYS else own[:, None], own[:, None] if KEYS else other[None]
            c = tl.where(mine[:, None] & there & (j <= i + shift), _mm(xi, uj.T, zero, PREC), -float("inf"))
            p = tl.exp2((c - tl.load(norm + i, i < N, 0.)) * scale) * tl.load(norm + N + i, i < N, 0.)
            if KEYS:
                dyi = _mm(_round(p, wj.dtype), wj, dyi, PREC)
                delta_i = tl.load(delta + i, i < N, 0.)           # [1,BN]
            ds = p * (_mm(yi, wj.T, zero, PREC) - delta_i)        # [BM,BN]
            dxi = _mm(_round(ds, uj.dtype), uj, dxi, PREC)
        tl.store(dx + at, _round(dxi * (scale * LN2), xi.dtype), d < D)
        tl.store(dy + at, _round(dyi, xi.dtype), (d < D) & KEYS)

    def _forward_triton(q, k, v, padding, rows, shift, scale):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        norm = torch.empty(*q.shape[:2], 2, q.shape[2], dtype=_acc(q), device=q.device)
        R, slot = len(rows), rows.new_full(q.shape[2:3], -1)      # [N]      where i is in rows, or -1
        slot[rows] = torch.arange(R, device=q.device)             #          of several places, one
        maps = torch.empty(*q.shape[:2], R, k.shape[2], dtype=norm.dtype, device=q.device).fill_(-math.inf)
        _launch(_forward_kernel, shift, scale, (q, k, v), padding, out, norm, maps, slot if R else None, R)
        top, over = norm[:, :, :, rows, None].unbind(2)           # [B,H,R,1], [B,H,R,1]
        return out, norm, ((maps[:, :, slot[rows]] - top) * scale).exp() * over

    def _backward_triton(do, q, k, v, padding, out, norm, shift, scale):
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        rest, N = (padding, out, norm, torch.empty_like(norm[:, :, 0])), q.shape[2]
        _launch(_backward_kernel, shift, scale, (q, do, k, v), *rest, dq, dq, N, KEYS=False)
        _launch(_backward_kernel, shift, scale, (k, v, q, do), *rest, dk, dv, N, KEYS=True)
        return dq, dk, dv

    def _launch(kernel, shift, scale, tensors, hidden, *rest, **options):
        tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
        (B, H, n, D), m, itemsize = tensors[0].shape, tensors[-1].shape[2], tensors[0].dtype.itemsize
        tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32" and not torch.version.hip
        options |= dict(D=D, BD=max(16, 1 << (D - 1).bit_length()), PREC="tf32" if tf32 else "ieee",
                        enable_fp_fusion=True, **_tiles(D, itemsize, "KEYS" in options))
        with torch.cuda.device_of(tensors[0]):
            kernel[(B * H * triton.cdiv(n, options["BM"]),)](
                *tensors, hidden if hidden is None else hidden.contiguous().int(), *rest, H, n, m, shift,
                *(s for x in tensors for s in x.stride()[:3]), scale * math.log2(math.e), **options)

def _tiles(D, itemsize, backward):
    """A table, not a tuner. None spills on sm_80, 90, 100, gfx90a, gfx942, except in fp32 above d = 64."""
    BN, warps = (16, 8) if itemsize > 2 or backward and D > 64 else (32, 4)
    return dict(BM=16 if itemsize == 8 else 64, BN=BN, num_warps=warps, num_stages=1 if itemsize > 2 else 3)

# ---- operators: what PyTorch runs on a device that has no kernel

@torch.library.custom_op(__name__.replace(".", "_") + "::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, rows: Tensor, shift: int,
             scale: float) -> tuple[Tensor, Tensor, Tensor]:
    p, _, v = _softmax(*(x.to(_acc(q)) for x in (q, k, v)), padding, shift, scale)
    return (p @ v).to(q.dtype), p.new_zeros(*q.shape[:2], 2, q.shape[2]), p[:, :, rows]

@torch.library.custom_op(__name__.replace(".", "_") + "::attention_backward", mutates_args=())
def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, out: Tensor, norm: Tensor,
              shift: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (do, q, k, v) = q.dtype, (x.to(_acc(q)) for x in (do, q, k, v))
    with torch.autocast(q.device.type, enabled=False):            # the caller may be inside of one
        p, k, v = _softmax(q, k, v, padding, shift, scale)        # [B,H,N,M]  again: no norm is needed
        ds = p * (do @ v.mT - (out * do).sum(-1, keepdim=True)) * scale           # [B,H,N,M]
        return (ds @ k).to(dtype), (ds.mT @ q).to(dtype), (p.mT @ do).to(dtype)

def _save(ctx, inputs, output):
    q, k, v, padding, _, ctx.shift, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, padding, *output[:2])
    ctx.mark_non_differentiable(*output[1:])

def _gradient(ctx, do, *_):
    return *_backward(do, *ctx.saved_tensors, ctx.shift, ctx.scale), *[None] * 4

def _no_second(ctx, *grads):
    raise NotImplementedError('the kernel has no second derivative: use attention(..., impl="reference")')

_forward.register_fake(lambda q, k, v, padding, rows, *_: (q.new_empty(q.shape), *(
    q.new_empty(*q.shape[:2], *n, dtype=_acc(q)) for n in ((2, q.shape[2]), (len(rows), k.shape[2])))))
_backward.register_fake(lambda do, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
_forward.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second)
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _forward.register_kernel(_device, _forward_triton)
    _backward.register_kernel(_device, _backward_triton)

# ---- public

def attention(q, k, v, causal=False, padding=None, rows=None, scale=None, impl="auto"):
    """out [B,H,N,d] of queries q [B,H,N,d] on keys and values k, v [B,H,M,d]; with rows, (out, maps).

    causal: i sees j <= i + M - N, though a NaN at a later j may show, as 0 NaN. padding [B,M] bool: True is a
    hidden key, never read. A query that sees no key has out, map and gradient 0. rows [R] int64: their maps
    are [B,H,R,M], fp32, without gradient. scale: None is d^-1/2. Autocast casts q, k, v, as for a matmul.
    impl: "triton" runs the kernel or says why it cannot; "auto" runs it where it can and the same formulas in
    PyTorch elsewhere; "reference" is plain autograd, the one with second derivatives.
    """
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        low = q.dtype if q.dtype == torch.float64 else torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return attention(q.to(low), k.to(low), v.to(low), causal, padding, rows, scale, impl)
    if not (q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape == (*k.shape[:2], q.shape[2], k.shape[3])
            and q.numel() and k.numel() and q.shape[3] <= 128 and q.dtype == k.dtype == v.dtype):
        got = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q must be [B,H,N,d], k, v [B,H,M,d], d <= 128, not empty, of one dtype, got {got}")
    if padding is not None and (padding.dtype, padding.shape) != (torch.bool, (len(k), k.shape[2])):
        raise ValueError(f"padding must be bool [B,M], got {padding.dtype} {list(padding.shape)}")
    if rows is not None and (rows.dtype, rows.ndim) != (torch.int64, 1):
        raise ValueError(f"rows must be int64 [R], got {rows.dtype} {list(rows.shape)}")
    if scale is not None and not scale > 0 or impl != "reference" and isinstance(scale, Tensor):
        raise ValueError(f'scale must be > 0, and a number unless impl="reference", got {scale}')
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and kind not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {kind}: {why}')
    if impl == "reference":
        return attention_reference(q, k, v, causal, padding, rows, scale)
    few = q.new_empty(0, dtype=torch.int64) if rows is None else rows.to(q.device)
    out, _, maps = _forward(q, k, v, padding, few, k.shape[2] - causal * q.shape[2], scale or q.shape[3]**-.5)
    return out if rows is None else (out, maps)
