"""CLIP's loss without its N x N matrix of logits: one pass over its tiles for rows and columns.

Learning Transferable Visual Models From Natural Language Supervision. Radford et al., ICML 2021, arXiv
2103.00020, Fig. 3. Rows a_i and b_i of a, b [N,D] are a pair: an image and its text, or two views.

    loss = mean_i -(log(exp(s_ii) / sum_k exp(s_ik)) + log(exp(s_ii) / sum_k exp(s_ki))) / 2, S = scale a b^T

    a, b      --tiles of S--> log-sum-exp of rows, running, and of columns, by blocks --merge--> lse, loss []
    a, b, lse --the same tiles--> G = P_rows + P_columns - 2 I, in chunks --G b, G^T a--> da, db [N,D]

P_rows is the softmax of each row. There are no atomics: two runs agree in every bit. lse keeps the maximum of
a_i . b_k and the log of the sum apart: as one fp32 number, at scale = 100, it costs P 1e-5. The gradient of
scale is the sum of G_ik a_i . b_k over the tiles, before G is rounded to the type of a.

FLOPs  2N^2 D forward, 6N^2 D backward at any D: S again, then G b, G^T a in PyTorch. open_clip: 4 and 8.
Bytes  a, b, da, db and fp32 sums of them; G, of which 2^27 elements exist at a time, and 5 KiB for a column.
       open_clip in bf16, counted op by op, moves 104 bytes per element of S and keeps 8 between forward and
       backward: at N = 32768 these are 112 GB moved and 8 GiB kept.
Saved  a, b, scale and lse. Recomputed: S.
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

PROGRAMS, CHUNK, LN2 = 256, 2**27, math.log(2)                    # in a launch; elements of G at a time

# ---- reference: the definition
def clip_loss_reference(a, b, scale):
    s = (a @ b.T).to(_acc(a)) * scale                             # [N,N]    s_ik
    pos = torch.arange(len(a), device=a.device)                   # [N]
    return (F.cross_entropy(s, pos) + F.cross_entropy(s.T, pos)) / 2              # []       Fig. 3

def _acc(z):
    return torch.promote_types(z.dtype, torch.float32)

# ---- kernels: c = a_i . b_k, scale times log2(e), so that exp(s) = 2^(c scale)
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
    def _products(a, b, row, col, n, stride_a, stride_b, ACC: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
        c = tl.zeros((BM, BN), ACC)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            c = _mm(_rows(a, row, d, n, stride_a, D), _rows(b, col, d, n, stride_b, D).T, c, PREC)
        return tl.where((row < n)[:, None] & (col < n), c, -float("inf"))         # [BM,BN]  a_i . b_k

    @triton.jit
    def _forward_kernel(a, b, scale, rows, cols, first, n, stride_a, stride_b, D: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = scale.dtype.element_ty
        block, part, scale = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.load(scale)
        span = tl.cdiv(tl.cdiv(n, BN), tl.num_programs(1)) * BN   #          columns of a part
        row = first + block * BM + tl.arange(0, BM)               # [BM]     i
        top = tl.full((BM,), -1e30, ACC)                          # [BM]     max of c over the k seen so far
        total = tl.zeros((BM,), ACC)                              # [BM]     sum of exp(s_ik - scale top_i)
        c_pos = tl.full((BM,), -float("inf"), ACC)                # [BM]     a_i . b_i
        for start in range(part * span, tl.minimum(part * span + span, n), BN):
            col = start + tl.arange(0, BN)                        # [BN]     k
            c = _products(a, b, row, col, n, stride_a, stride_b, ACC, D, BM, BN, BD, PREC)       # [BM,BN]
            c_pos = tl.maximum(c_pos, tl.max(tl.where(row[:, None] == col, c, -float("inf")), 1))
            old, top = top, tl.maximum(top, tl.max(c, 1))
            total = total * tl.exp2((old - top) * scale) + tl.sum(tl.exp2((c - top[:, None]) * scale), 1)
            best = tl.maximum(tl.max(c, 0), -1e30)                # [BN]     of the rows of this block
            tl.store(cols + block * 2 * n + col, best, col < n)   # [blocks,2,N]
            tl.store(cols + (block * 2 + 1) * n + col, tl.sum(tl.exp2((c - best) * scale), 0), col < n)
        tl.store(rows + part * 3 * n + row, top, row < n)         # [parts,3,N]
        tl.store(rows + (part * 3 + 1) * n + row, total, row < n)
        tl.store(rows + (part * 3 + 2) * n + row, c_pos, row < n)

    @triton.jit
    def _backward_kernel(a, b, scale, lse, g, slope, first, n, stride_a, stride_b, D: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = scale.dtype.element_ty
        row = first + tl.program_id(0) * BM + tl.arange(0, BM)    # [BM]     i
        col = tl.program_id(1) * BN + tl.arange(0, BN)            # [BN]     k
        c = _products(a, b, row, col, n, stride_a, stride_b, ACC, D, BM, BN, BD, PREC)           # [BM,BN]
        scale = tl.load(scale)
        top_i = tl.load(lse + row, row < n, 0.)[:, None]          # [BM,1]
        log_i = tl.load(lse + 2 * n + row, row < n, 0.)[:, None]  # [BM,1]
        top_k = tl.load(lse + n + col, col < n, 0.)               # [BN]
        log_k = tl.load(lse + 3 * n + col, col < n, 0.)           # [BN]
        out = tl.exp2((c - top_i) * scale - log_i) + tl.exp2((c - top_k) * scale - log_k)        # [BM,BN]
        out -= tl.where(row[:, None] == col, 2., 0.)              # [BM,BN]  G, rounded only below
        seen = (row < n)[:, None] & (col < n)
        at = g + (row - first).to(tl.int64)[:, None] * n + col    # 2^12: keeps P ~ 1/N normal in fp16
        tl.store(at, _round(out * 4096, g.dtype.element_ty), seen)
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(slope + tile, tl.sum(out * tl.where(seen, c, 0.)))               # []       sum of G c

    def _forward_triton(a, b, scale):
        a, b, options = _plan(a, b, backward=False)
        n, new = len(a), dict(dtype=scale.dtype, device=a.device)
        blocks = min(PROGRAMS, triton.cdiv(n, options["BM"]))     # at a time, so that cols are O(N)
        parts = min(PROGRAMS // blocks, triton.cdiv(n, options["BN"]))            # few blocks: more programs
        rows, cols, seen = torch.empty(parts, 3, n, **new), torch.empty(blocks, 2, n, **new), None
        for first in range(0, n, blocks * options["BM"]):
            with torch.cuda.device_of(a):
                _forward_kernel[blocks, parts](
                    a, b, scale, rows, cols, first, n, a.stride(0), b.stride(0), **options)
            seen = _merge(cols if seen is None else torch.cat([cols, seen[None]]), scale)        # [2,N]
        top, total = torch.cat([_merge(rows, scale), seen], 1)    # [2N], [2N]
        loss = (top - rows[:, 2].amax(0).repeat(2)) * (scale * LN2) + total.log() # [2N]     Fig. 3
        return loss.mean(dtype=torch.float64).to(loss.dtype), torch.stack([top, total.log2()])

    def _backward_triton(a, b, scale, lse, both):
        a, b, options = _plan(a, b, backward=True)
        n, BM, da, db, slopes = len(a), options["BM"], [], scale.new_zeros(b.shape if both else 0), []
        step = max(1, CHUNK // (n * BM)) * BM
        whole = torch.empty(min(step, n), n, dtype=a.dtype, device=a.device)      # of each chunk in turn
        for first in range(0, n, step):
            ai, g = a[first:first + step], whole[:n - first]      # [chunk,D], [chunk,N]
            grid = triton.cdiv(len(ai), BM), triton.cdiv(n, options["BN"])
            slopes.append(torch.empty(grid, dtype=scale.dtype, device=a.device))
            with torch.cuda.device_of(a):
                _backward_kernel[grid](
                    a, b, scale, lse, g, slopes[-1], first, n, a.stride(0), b.stride(0), **options)
            da.append(_matmul(g, b) / 4096)
            if both:
                db.add_(_matmul(g.T, ai), alpha=1 / 4096)
        return torch.cat(da), db, torch.cat(slopes).sum()

    def _matmul(x, y):                                            # sums and result in fp32
        return torch.mm(x, y, out_dtype=_acc(x)) if x.is_cuda else (x.double() @ y.double()).to(_acc(x))

    def _merge(parts, scale):                                     # [P,2,N] -> [2,N]: top, total of all parts
        top = parts[:, 0].amax(0)
        return torch.stack([top, (parts[:, 1] * ((parts[:, 0] - top) * scale).exp2()).sum(0)])

def _plan(a, b, backward):
    a, b = (z if z.stride(1) == 1 else z.contiguous() for z in (a, b))
    tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32" and not torch.version.hip
    return a, b, dict(D=a.shape[1], PREC="tf32" if tf32 else "ieee", enable_fp_fusion=True,
                      **_tiles(a.shape[1], a.dtype.itemsize, _shared_memory(a), backward))

def _tiles(D, itemsize, shared, backward):
    """A table, not a tuner: the same bits on every run. None spills on sm_80, 90, 100, gfx90a, gfx942."""
    if not shared or itemsize == 8:                               # BM, BN, BD, num_warps, num_stages
        tile = 32, 32, 16 if shared else 64, 4, 1
    elif itemsize == 4:
        tile = 64, 32 if backward else 64, 32, 8, 2
    elif shared < 160_000:
        tile = 64, 64, 64, 8, 2
    else:
        tile = 128, 64, 64, 8, 3
    options = dict(zip(("BM", "BN", "BD", "num_warps", "num_stages"), tile, strict=True))
    return options | dict(BD=min(options["BD"], max(16, 1 << (D - 1).bit_length())))

def _shared_memory(z):
    if z.is_cpu:                                                  # the interpreter
        return 0
    gpu = torch.cuda.get_device_properties(z.device)
    return max(gpu.shared_memory_per_block, getattr(gpu, "shared_memory_per_block_optin", 0))

# ---- operators: what PyTorch runs on a device that has no kernel
@torch.library.custom_op(__name__.replace(".", "_") + "::clip_loss", mutates_args=())
def _forward(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    loss = clip_loss_reference(a.to(scale.dtype), b.to(scale.dtype), scale * LN2)
    return loss, loss.new_zeros(2, 2 * len(a))                    # only the kernel needs lse

@torch.library.custom_op(__name__.replace(".", "_") + "::clip_loss_backward", mutates_args=())
def _backward(a: Tensor, b: Tensor, scale: Tensor, lse: Tensor, both: bool) -> tuple[Tensor, Tensor, Tensor]:
    a, b = a.to(scale.dtype), b.to(scale.dtype)
    with torch.autocast(a.device.type, enabled=False):            # the caller may be inside of one
        c = a @ b.T                                               # [N,N]
        s = c * (scale * LN2)                                     # [N,N]
        g = s.softmax(1) + s.softmax(0) - 2 * torch.eye(len(a), dtype=a.dtype, device=a.device)
        return g @ b, g.T @ a if both else scale.new_empty(0), (g * c).sum()

def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])

def _gradient(ctx, go, _):
    a, b, scale, lse = ctx.saved_tensors
    both, go = ctx.needs_input_grad[1], go * (LN2 / (2 * len(a)))
    da, db, slope = _backward(a, b, scale, lse, both)             # G b, G^T a, sum of G * a b^T
    db = (db * (go * scale)).to(b.dtype) if both else None
    return (da * (go * scale)).to(a.dtype), db, slope * go

def _no_second(ctx, *grads):
    raise NotImplementedError('the kernel has no second derivative: use clip_loss(..., impl="reference")')

_forward.register_fake(lambda a, b, scale: (torch.empty_like(scale), scale.new_empty(2, 2 * len(a))))
_backward.register_fake(lambda a, b, scale, lse, both: (
    scale.new_empty(a.shape), scale.new_empty(b.shape if both else 0), torch.empty_like(scale)))
_forward.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second)
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _forward.register_kernel(_device, _forward_triton)
    _backward.register_kernel(_device, _backward_triton)

# ---- public
def clip_loss(a: Tensor, b: Tensor, scale: float | Tensor, impl: str = "auto") -> Tensor:
    """Mean loss of both directions, fp32 [] (fp64 for fp64), of a, b [N,D] that the caller has normalised.

    scale: positive; a 0-d tensor, which may learn, is not looked at (0 works, below 0 it may overflow).
    impl: "triton" runs the kernel or says why it cannot; "auto" runs it where it can and the same formulas in
    PyTorch elsewhere; "reference" is plain autograd, the one with second derivatives.
    Autocast casts a and b to its dtype, as it would for a matmul; everything after the product stays fp32.
    """
    kind = a.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        low = a.dtype if a.dtype == torch.float64 else torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return clip_loss(a.to(low), b.to(low), scale, impl)
    if a.ndim != 2 or a.shape != b.shape or not a.numel() or a.dtype != b.dtype or a.device != b.device:
        raise ValueError("a and b must be [N,D] with N, D >= 1, of one dtype and device, got "
                         f"{[*a.shape]} {a.dtype} and {[*b.shape]} {b.dtype}, on {a.device}, {b.device}")
    if scale.ndim if torch.is_tensor(scale) else not scale > 0:
        raise ValueError(f"scale must be a positive number or a 0-d tensor, got {scale}")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and kind not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {kind}: {why}')
    if impl == "reference":
        return clip_loss_reference(a, b, scale)
    if b.requires_grad and not a.requires_grad:
        a, b = b, a                                               # the same loss, and da is made in any case
    scale = scale.to(a.device, _acc(a)) if torch.is_tensor(scale) else a.new_full((), scale, dtype=_acc(a))
    return _forward(a, b, (scale + (scale == 0) * 1e-30) / LN2)[0]                # as 0 * inf is not 0
