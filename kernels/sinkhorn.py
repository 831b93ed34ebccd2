"""The codes of SwAV and DINOv2: Sinkhorn-Knopp on a batch of scores, in the log domain.

Unsupervised Learning of Visual Features by Contrasting Cluster Assignments. Caron, Misra, Mairal, Goyal,
Bojanowski, Joulin, NeurIPS 2020, arXiv 2006.09882. Row i of s [B,K] has the scores of sample i.

    Q = exp(s / eps), then n times: column of each prototype / its sum, row of each sample / its sum

    f_i = 0, then n times:  g_k = eps log sum_i exp((s_ik - f_i) / eps)
                            f_i = eps log sum_k exp((s_ik - g_k) / eps);  Q_ik = exp((s_ik - f_i - g_k) / eps)

    s    --log-sum-exp of columns--> [splits,K] --merge, also over ranks--> c [K]     the first g
    s - c, g [K] = 0  --log-sum-exp of rows--> f [B] --and of columns--> g [K]        n-1 times
    s - c, g          --softmax of rows------> codes [B,K]

Both are the same n steps, but exp(s / eps) overflows fp32 at s = 89 eps. A shift of a column is harmless, for
the first step undoes it: f and g are those of s - c, where they are small, and so is their rounding. A shift
of a row by its maximum, as in a softmax, starts from another f and has another result. There are no atomics:
two runs agree in every bit.

FLOPs  2n + 1 exponentials of each score and no GEMM.
Bytes  2n + 1 reads of s and one write of codes: 16 per score in bf16 at n = 3. DINOv2's loop in PyTorch,
       counted op by op, moves 162.
Saved  Nothing: codes are targets and have no gradient.
Types  Codes have the type of s. Potentials and sums are fp32 (fp64 for fp64).
"""
import math

import torch
import torch.distributed as dist
from torch import Tensor

try:
    import triton.knobs
    import triton.language as tl
except ImportError:
    triton = None                                                 # every call then runs in PyTorch

PROGRAMS = 1024                                                   # of the column pass, at most


# ---- reference: the definition

def sinkhorn_reference(s, eps=.05, iterations=3, group=None):
    log_q = s.to(_acc(s)) / eps                                   # [B,K]
    for _ in range(iterations):
        log_q = log_q - _over_ranks(log_q.logsumexp(0), 1, group)  # each column sums to 1
        log_q = log_q.log_softmax(1)                              # each row sums to 1
    return log_q.exp().to(s.dtype)                                # [B,K]    Q


def _acc(s):
    return torch.promote_types(s.dtype, torch.float32)


def _over_ranks(g, eps, group):
    """eps log sum exp(g / eps) over the ranks of group, g [K]. A rank without rows has g = -inf."""
    if group is None:
        return g
    top = g.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    total = ((g - top) / eps).exp()
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return top + total.log() * eps


# ---- kernels: scale = log2(e) / eps, so that exp(x / eps) = 2^(x scale)

if triton:
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)      # TRITON_INTERPRET=1: kernels on the CPU

    @triton.jit
    def _round(x, dtype: tl.constexpr):
        if INTERPRET and dtype == tl.bfloat16:                    # it truncates; this is nearest even
            bits = x.to(tl.uint32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return x.to(dtype)

    @triton.jit
    def _scores(s, row, col, mask, stride_b, stride_k, ACC: tl.constexpr):
        at = s + row.to(tl.int64)[:, None] * stride_b + col.to(tl.int64) * stride_k
        return tl.load(at, mask, -float("inf")).to(ACC)           # [BM,BN]

    @triton.jit
    def _add(top, total, x, scale, AXIS: tl.constexpr):
        """top: max of the x seen so far; total: sum of 2^((x - top) scale)."""
        new = tl.maximum(top, tl.max(x, AXIS))
        safe = tl.where(new == -float("inf"), 0., new)            # only scores of -inf so far: no inf - inf
        terms = tl.exp2((x - tl.expand_dims(safe, AXIS)) * scale)
        return new, total * tl.exp2((top - safe) * scale) + tl.sum(terms, AXIS)

    # Strides are constants: a compiler that knows K = 3000 to be a multiple of 8 loads 16 bytes at once.
    @triton.jit
    def _columns_kernel(s, c, f, g, B, rows, stride_b: tl.constexpr, stride_k: tl.constexpr,
                        scale: tl.float64, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        ACC: tl.constexpr = g.dtype.element_ty
        col = tl.program_id(0) * BN + tl.arange(0, BN)            # [BN]     k
        first = tl.program_id(1) * rows
        scale = tl.full((1,), scale, ACC)                         # [1]      fp64 until here
        top = tl.full((BN,), -float("inf"), ACC)                  # [BN]
        total = tl.zeros((BN,), ACC)                              # [BN]
        for start in range(first, tl.minimum(first + rows, B), BM):
            row = start + tl.arange(0, BM)                        # [BM]     i
            x = _scores(s, row, col, (row < B)[:, None] & (col < K), stride_b, stride_k, ACC)
            if f is not None:
                x = x - tl.load(c + col, col < K, 0.) - tl.load(f + row, row < B, 0.)[:, None]
            top, total = _add(top, total, x, scale, 0)
        g += tl.program_id(1) * K                                 # [K]      of the rows of this split
        total = tl.where(total == 0, 1., total)                   # [BN]     top is -inf, and g is to be too
        tl.store(g + col, top + tl.log2(total) / scale, col < K)  # [BN]     g_k

    @triton.jit
    def _rows_kernel(s, c, g, out, B, stride_b: tl.constexpr, stride_k: tl.constexpr, scale: tl.float64,
                     K: tl.constexpr, CODES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        ACC: tl.constexpr = g.dtype.element_ty
        row = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), B - 1)         # [BM]  i, the last repeated
        scale = tl.full((1,), scale, ACC)                         # [1]      fp64 until here
        top = tl.full((BM,), -float("inf"), ACC)                  # [BM]
        total = tl.zeros((BM,), ACC)                              # [BM]
        for start in range(0, K, BN):
            col = start + tl.arange(0, BN)                        # [BN]     k
            x = _scores(s, row, col, col < K, stride_b, stride_k, ACC)
            x = x - tl.load(c + col, col < K, 0.) - tl.load(g + col, col < K, 0.)
            top, total = _add(top, total, x, scale, 1)
        if CODES:
            for start in range(0, K, BN):
                col = start + tl.arange(0, BN)                    # [BN]     k
                x = _scores(s, row, col, col < K, stride_b, stride_k, ACC)
                x = x - tl.load(c + col, col < K, 0.) - tl.load(g + col, col < K, 0.)
                code = tl.exp2((x - top[:, None]) * scale) / total[:, None]
                at = out + row.to(tl.int64)[:, None] * K + col
                tl.store(at, _round(code, out.dtype.element_ty), col < K)         # [BM,BN]  Q
        else:
            tl.store(out + row, top + tl.log2(total) / scale)     # [BM]     f_i

    def _columns_triton(s: Tensor, c: Tensor | None, f: Tensor | None, eps: float) -> Tensor:
        (B, K), options = s.shape, _plan(s, columns=True)
        if not B:
            return s.new_full((K,), -math.inf, dtype=_acc(s))
        blocks, tiles = triton.cdiv(K, options["BN"]), triton.cdiv(B, options["BM"])
        rows = triton.cdiv(tiles, max(1, PROGRAMS // blocks)) * options["BM"]     # of one split
        g = torch.empty(triton.cdiv(B, rows), K, dtype=_acc(s), device=s.device)
        with torch.cuda.device_of(s):
            _columns_kernel[blocks, len(g)](
                s, c, f, g, B, rows, *s.stride(), math.log2(math.e) / eps, **options)
        return g[0] if len(g) == 1 else _columns_triton(g, None, None, eps)       # merge: again columns

    def _rows_triton(s: Tensor, c: Tensor, g: Tensor, eps: float) -> Tensor:
        return _launch_rows(s, c, g, torch.empty(len(s), dtype=_acc(s), device=s.device), eps, False)

    def _codes_triton(s: Tensor, c: Tensor, g: Tensor, eps: float) -> Tensor:
        return _launch_rows(s, c, g, torch.empty(s.shape, dtype=s.dtype, device=s.device), eps, True)

    def _launch_rows(s, c, g, out, eps, codes):
        options = _plan(s, columns=False) | dict(CODES=codes)
        with torch.cuda.device_of(s):
            _rows_kernel[(triton.cdiv(len(s), options["BM"]),)](
                s, c, g, out, len(s), *s.stride(), math.log2(math.e) / eps, **options)
        return out


def _plan(s, columns):
    return dict(K=s.shape[1], enable_fp_fusion=True, **_tiles(s.shape[1], columns))


def _tiles(K, columns):
    """A table, not a tuner: the same bits on every run. None spills on sm_80, 90, 100, gfx90a, gfx942."""
    BN = min(128 if columns else 4096, max(16, 1 << (K - 1).bit_length()))
    return dict(BM=4096 // BN, BN=BN, num_warps=4, num_stages=1)


# ---- operators: what PyTorch runs on a device that has no kernel

@torch.library.custom_op(__name__.replace(".", "_") + "::sinkhorn_columns", mutates_args=())
def _columns(s: Tensor, c: Tensor | None, f: Tensor | None, eps: float) -> Tensor:
    x = s.to(_acc(s)) if f is None else s - c - f[:, None]        # [B,K]
    return (x / eps).logsumexp(0) * eps                           # [K]      g_k


@torch.library.custom_op(__name__.replace(".", "_") + "::sinkhorn_rows", mutates_args=())
def _rows(s: Tensor, c: Tensor, g: Tensor, eps: float) -> Tensor:
    return ((s - c - g) / eps).logsumexp(1) * eps                 # [B]      f_i


@torch.library.custom_op(__name__.replace(".", "_") + "::sinkhorn_codes", mutates_args=())
def _codes(s: Tensor, c: Tensor, g: Tensor, eps: float) -> Tensor:
    return ((s - c - g) / eps).softmax(1).to(s.dtype).contiguous()                # [B,K]  Q


_columns.register_fake(lambda s, c, f, eps: s.new_empty(s.shape[1], dtype=_acc(s)))
_rows.register_fake(lambda s, c, g, eps: s.new_empty(s.shape[0], dtype=_acc(s)))
_codes.register_fake(lambda s, c, g, eps: s.new_empty(s.shape))
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _columns.register_kernel(_device, _columns_triton)
    _rows.register_kernel(_device, _rows_triton)
    _codes.register_kernel(_device, _codes_triton)


# ---- public

@torch.no_grad()
def sinkhorn(s: Tensor, eps: float = .05, iterations: int = 3, group=None, impl: str = "auto") -> Tensor:
    """Codes [B,K], of the type of s, without gradient: rows sum to 1, columns sum nearly to B/K.

    group: the process group whose ranks have the other rows of the batch, dist.group.WORLD for all of them;
    only K numbers a rank travel. Ranks may have different B, also 0, and all must call. None: s is the batch.
    impl: "triton" runs the kernel or says why it cannot; "auto" runs it where it can and the same formulas in
    PyTorch elsewhere; "reference" is the definition. Autocast changes nothing: there is no matrix product.
    A score of -inf is a code of 0. NaN, or a row or column of nothing but -inf, makes NaN, as 0/0 would.
    """
    if s.ndim != 2 or not s.shape[1] or not s.is_floating_point():
        raise ValueError(f"s must be floating [B,K] with K >= 1, got {s.dtype} {list(s.shape)}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive, got {eps}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and s.device.type not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {s.device.type}: {why}')
    if impl == "reference":
        return sinkhorn_reference(s, eps, iterations, group)
    c = _over_ranks(_columns(s, None, None, eps), eps, group)     # [K]
    g = torch.zeros_like(c)                                       # [K]
    for _ in range(iterations - 1):
        f = _rows(s, c, g, eps)                                   # [B]
        g = _over_ranks(_columns(s, c, f, eps), eps, group)
    return _codes(s, c, g, eps)
