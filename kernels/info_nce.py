"""InfoNCE without its matrix of logits: queries against a memory bank, a queue or the keys of all processes.

CPC. van den Oord, Li, Vinyals, 2018, arXiv 1807.03748, Eq. 4. With a queue: MoCo. He, Fan, Wu, Xie, Girshick,
CVPR 2020, arXiv 1911.05722, Eq. 1.

    loss = mean_i -log(exp(s_i,pos(i)) / sum_j exp(s_ij)), s_ij = q_i . k_j / tau
    pos(i) = target_i, or a key k+_i of row i alone, which joins the sum

    q, k      --tiles of S = q k^T / tau--> log-sum-exp of parts of the keys --merge--> lse [2,B], loss []
    q, k, lse --the same tiles again------> G = P - Pos --G k, G^T q--> dq [B,D], and dk [M,D] if it is wanted

If rows are few, up to 256 programs share the keys. There are no atomics: two runs agree in every bit. lse
keeps the maximum of q_i . k_j and the log of the sum apart: one fp32 number, at tau = 0.01, costs P 1e-5.

FLOPs  2BMD forward, 4 for dq, 4 for dk (PyTorch 2 each): S again, and so for each 256 columns (fp32: 128).
Bytes  q, k, dq, dk, these also in fp32, once for each part. Plain PyTorch in bf16, counted op by op, moves
       61 bytes per logit and keeps 4: with B = 256 and M = 1.28 million these are 20 GB and 1.3 GB.
Saved  q, k, target and lse. Recomputed: S.
Types  Sums are fp32 (fp64 for fp64). fp32 GEMMs use TF32 where torch.set_float32_matmul_precision allows it.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton.knobs
    import triton.language as tl
except ImportError:
    triton = None                                                 # every call then runs in PyTorch

PROGRAMS, LN2 = 256, math.log(2)

# ---- reference: the definition
def info_nce_reference(q, k, target, tau):
    s = (q @ k.T).to(_acc(q)) / tau                               # [B,M]    s_ij
    if target.is_floating_point():                                # k+ in front, so that pos(i) = 0
        s = torch.cat([(q * target).sum(1, keepdim=True).to(s.dtype) / tau, s], 1)               # [B,1+M]
        target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    return F.cross_entropy(s, target.long(), ignore_index=-2**62) # []       Eq. 4; MoCo, Eq. 1

def _acc(z):
    return torch.promote_types(z.dtype, torch.float32)

# ---- kernels: c = q_i . k_j, scale = log2(e) / tau, so that exp(s) = 2^(c scale)
if triton:
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)      # TRITON_INTERPRET=1: kernels on the CPU

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
    def _rows(z, row, d, n, stride, D: tl.constexpr):
        return tl.load(z + row.to(tl.int64)[:, None] * stride + d, (row < n)[:, None] & (d < D), 0.)

    @triton.jit
    def _products(a, b, row, col, n, m, stride_a, stride_b, ACC: tl.constexpr, D: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
        c = tl.zeros((BM, BN), ACC)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            c = _mm(_rows(a, row, d, n, stride_a, D), _rows(b, col, d, m, stride_b, D).T, c, PREC)
        return tl.where((row < n)[:, None] & (col < m), c, -float("inf"))         # [BM,BN]  a_i . b_j

    @triton.jit
    def _forward_kernel(q, k, pos, parts, n, m, stride_q, stride_k, scale: tl.float64, D: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = parts.dtype.element_ty
        scale = tl.full((1,), scale, ACC)                         # [1]      fp64 until here
        part, span = tl.program_id(1), tl.cdiv(tl.cdiv(m, BN), tl.num_programs(1)) * BN          # of the keys
        row = tl.program_id(0) * BM + tl.arange(0, BM)            # [BM]     i
        at = -1 if pos is None else tl.load(pos + row, row < n, -1)[:, None]      # [BM,1]   pos(i)
        top = tl.full((BM,), -1e30, ACC)                          # [BM]     max of c over the j seen so far
        total = tl.zeros((BM,), ACC)                              # [BM]     sum of exp(s_ij - top_i / tau)
        c_pos = tl.full((BM,), -float("inf"), ACC)                # [BM]     q_i . k_pos(i)
        for start in range(part * span, tl.minimum(part * span + span, m), BN):
            col = start + tl.arange(0, BN)                        # [BN]     j
            c = _products(q, k, row, col, n, m, stride_q, stride_k, ACC, D, BM, BN, BD, PREC)    # [BM,BN]
            c_pos = tl.maximum(c_pos, tl.max(tl.where(col == at, c, -float("inf")), 1))
            old, top = top, tl.maximum(top, tl.max(c, 1))
            total = total * tl.exp2((old - top) * scale) + tl.sum(tl.exp2((c - top[:, None]) * scale), 1)
        at = parts + 3 * part * n + row                           # [parts,3,B]
        tl.store(at, top, row < n)
        tl.store(at + n, total, row < n)
        tl.store(at + 2 * n, c_pos, row < n)

    @triton.jit
    def _backward_kernel(a, b, pos, lse, out, n, m, stride_a, stride_b, scale: tl.float64, SWAP: tl.constexpr,
                         D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                         BO: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = lse.dtype.element_ty
        scale, B = tl.full((1, 1), scale, ACC), m if SWAP else n  # [1,1]    fp64 until here
        part, span = tl.program_id(1), tl.cdiv(tl.cdiv(m, BN), tl.num_programs(1)) * BN          # of b
        row = tl.program_id(0) * BM + tl.arange(0, BM)            # [BM]     of a: i; j if SWAP
        d = (0 if D <= BO else tl.program_id(2) * BO) + tl.arange(0, BO)          # [BO]     columns of out
        acc = tl.zeros((BM, BO), ACC)                             # [BM,BO]  G b
        for start in range(part * span, tl.minimum(part * span + span, m), BN):
            col = start + tl.arange(0, BN)                        # [BN]     of b
            c = _products(a, b, row, col, n, m, stride_a, stride_b, ACC, D, BM, BN, BD, PREC)    # [BM,BN]
            i = col[None, :] if SWAP else row[:, None]
            top_i, log_i = tl.load(lse + i, i < B, 0.), tl.load(lse + B + i, i < B, 0.)
            g = tl.exp2((c - top_i) * scale - log_i)              # [BM,BN]  P
            if pos is not None:                                   # [BM,BN]  G, rounded only after
                g -= tl.where(tl.load(pos + i, i < B, -1) == (row[:, None] if SWAP else col), 1., 0.)
            g = _round(g * 4096, a.dtype.element_ty)              # 2^12: keeps P ~ 1/M normal in fp16
            acc = _mm(g, _rows(b, col, d, m, stride_b, D), acc, PREC)
        at = out + (part.to(tl.int64) * n + row)[:, None] * D + d                 # [parts,n,D]
        tl.store(at, acc / 4096, (row < n)[:, None] & (d < D))

    def _forward_triton(q, k, target, tau):
        q, k, parts, options = _plan(q, k, backward=False)
        n, own, scale = len(q), target.is_floating_point(), 1 / (LN2 * tau)
        rows = torch.empty(parts, 3, n, dtype=_acc(q), device=q.device)           # top, total, c_pos
        with torch.cuda.device_of(q):
            _forward_kernel[triton.cdiv(n, options["BM"]), parts](
                q, k, None if own else target, rows, n, len(k), q.stride(0), k.stride(0), scale, **options)
        if own:                                                   # a part of one key
            rows = torch.cat([rows, torch.stack([target, torch.ones_like(target), target])[None]])
        top, c_pos = rows[:, 0].amax(0), rows[:, 2].amax(0)       # [B]
        total = (rows[:, 1] * ((rows[:, 0] - top) * scale).exp2()).sum(0)         # [B]
        loss = (top - c_pos) / tau + total.log()                  # [B]      Eq. 4
        return loss.mean(dtype=torch.float64).to(loss.dtype), torch.stack([top, total.log2()])

    def _backward_triton(a, b, target, lse, tau, swap):
        a, b, parts, options = _plan(a, b, backward=True)
        out = torch.empty(parts, *a.shape, dtype=lse.dtype, device=a.device)
        grid = triton.cdiv(len(a), options["BM"]), parts, triton.cdiv(a.shape[1], options["BO"])
        pos = None if target.is_floating_point() else target
        with torch.cuda.device_of(a):
            _backward_kernel[grid](a, b, pos, lse, out, len(a), len(b), a.stride(0), b.stride(0),
                                   1 / (LN2 * tau), swap, **options)
        return out.sum(0)

def _plan(a, b, backward):
    a, b = (z if z.stride(1) == 1 else z.contiguous() for z in (a, b))
    tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32" and not torch.version.hip
    options = dict(D=a.shape[1], PREC="tf32" if tf32 else "ieee", enable_fp_fusion=True,
                   **_tiles(a.shape[1], a.dtype.itemsize, _shared_memory(a), backward))
    blocks = triton.cdiv(len(a), options["BM"]) * triton.cdiv(a.shape[1], options.get("BO", a.shape[1]))
    return a, b, max(1, min(triton.cdiv(len(b), options["BN"]), PROGRAMS // blocks)), options

def _tiles(D, itemsize, shared, backward):
    """A table, not a tuner: the same bits on every run. None spills on sm_80, 90, 100, gfx90a, gfx942."""
    wide, pow2 = D > 128, max(16, 1 << (D - 1).bit_length())
    if not shared or itemsize == 8:                               # BM, BN, BD, BO, num_warps, num_stages
        tile = 32, 32, 16 if shared else 64, 64, 4, 1
    elif itemsize == 4:
        tile = 64, 32, 16 if backward else 32, 128, 8, 2
    elif shared < 160_000:
        tile = (64, 64, 64, 256, 8, 2) if wide else (64, 32 if backward else 64, 128, 128, 4, 2)
    elif backward:
        tile = 64 if wide else 128, 64, 64 if wide else 128, 256, 8, 3
    else:
        tile = 128, 128 if wide and shared > 200_000 else 64, 64 if wide else 128, 256, 8, 3
    BM, BN, BD, BO, num_warps, num_stages = tile
    options = dict(BM=BM, BN=BN, BD=min(BD, pow2), num_warps=num_warps, num_stages=num_stages)
    return options | dict(BO=min(BO, pow2)) if backward else options

def _shared_memory(z):
    if z.is_cpu:                                                  # the interpreter
        return 0
    gpu = torch.cuda.get_device_properties(z.device)
    return max(gpu.shared_memory_per_block, getattr(gpu, "shared_memory_per_block_optin", 0))

# ---- operators: what PyTorch runs on a device that has no kernel. target: int32 [B], or q_i . k+_i, [B]
@torch.library.custom_op(__name__.replace(".", "_") + "::info_nce", mutates_args=())
def _forward(q: Tensor, k: Tensor, target: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    c, pos = q.to(_acc(q)) @ k.to(_acc(k)).T, target              # [B,M]
    if target.is_floating_point():
        c, pos = torch.cat([target[:, None], c], 1), torch.zeros_like(target)     # [B,1+M]
    c_pos = c.where(pos[:, None] == torch.arange(c.shape[1], device=c.device), -math.inf).amax(1)
    top = c.amax(1)                                               # [B]
    log = ((c - top[:, None]) / tau).exp().sum(1).log2()          # [B]
    return ((top - c_pos) / tau + log * LN2).mean(), torch.stack([top, log])

@torch.library.custom_op(__name__.replace(".", "_") + "::info_nce_backward", mutates_args=())
def _backward(a: Tensor, b: Tensor, target: Tensor, lse: Tensor, tau: float, swap: bool) -> Tensor:
    q, k = (x.to(lse.dtype) for x in ((b, a) if swap else (a, b)))
    with torch.autocast(q.device.type, enabled=False):            # the caller may be inside of one
        g = ((q @ k.T - lse[0, :, None]) / tau - lse[1, :, None] * LN2).exp()     # [B,M]
        if not target.is_floating_point():
            g -= (target[:, None] == torch.arange(len(k), device=k.device)).to(g.dtype)
        return g.T @ q if swap else g @ k

def _save(ctx, inputs, output):
    *tensors, ctx.tau = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])

def _gradient(ctx, go, _):
    q, k, target, lse = ctx.saved_tensors
    go, tau = go / (len(q) * ctx.tau), ctx.tau
    dq = (go * _backward(q, k, target, lse, tau, False)).to(q.dtype)
    dk = (go * _backward(k, q, target, lse, tau, True)).to(k.dtype) if ctx.needs_input_grad[1] else None
    dc = go * (((target - lse[0]) / tau - lse[1] * LN2).exp() - 1) if ctx.needs_input_grad[2] else None
    return dq, dk, dc if dc is None else dc + 0 * dq[:, 0].nan_to_num(0, 0, 0), None    # no second, as of dq

def _no_second(ctx, *grads):
    raise NotImplementedError('the kernel has no second derivative: use info_nce(..., impl="reference")')

_forward.register_fake(lambda q, *_: (q.new_empty((), dtype=_acc(q)), q.new_empty(2, len(q), dtype=_acc(q))))
_backward.register_fake(lambda a, *_: a.new_empty(a.shape, dtype=_acc(a)))
_forward.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second)
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _forward.register_kernel(_device, _forward_triton)
    _backward.register_kernel(_device, _backward_triton)

# ---- public
def info_nce(q: Tensor, k: Tensor, target: Tensor, tau: float, impl: str = "auto") -> Tensor:
    """Mean loss, fp32 [] (fp64 for fp64), of q [B,D] among the keys k [M,D]; the caller has normalised them.

    target: int [B], the place of the positive in k, or floating [B,D], the positive itself. If k has no such
    place, its P is 0: the loss is inf, the gradients are those of the other keys; the reference raises.
    impl: "triton" runs the kernel or says why it cannot; "auto" runs it where it can, the same formulas in
    PyTorch elsewhere; "reference" is plain autograd, with second derivatives and a learnable tau. Autocast
    casts the rows to its dtype, as it would for a matmul; everything after the product stays fp32.
    """
    own, kind = target.is_floating_point(), q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        low = q.dtype if q.dtype == torch.float64 else torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return info_nce(q.to(low), k.to(low), target.to(low) if own else target, tau, impl)
    fits = k.shape[1:] == q.shape[1:] and target.shape == q.shape[:1 + own] and q.dtype == k.dtype
    if q.ndim != 2 or not fits or not q.numel() * len(k) or not q.device == k.device == target.device:
        raise ValueError("q [B,D], k [M,D] of one dtype, target [B] or [B,D], one device, B, M, D >= 1, got "
                         f"{[*q.shape]} {q.dtype}, {[*k.shape]} {k.dtype}, {[*target.shape]}")
    if not tau > 0 or impl != "reference" and isinstance(tau, Tensor):
        raise ValueError(f'tau must be positive, and a number unless impl="reference", got {tau}')
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and kind not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {kind}: {why}')
    if impl == "reference":
        return info_nce_reference(q, k, target, tau)
    target = (q * target.to(_acc(q))).sum(1) if own else target.long().clamp(-1, len(k)).int()
    return _forward(q, k, target, tau)[0]
