"""Cross-entropy of DINO, iBOT and SwAV between a sharp teacher and a student: no softmax is ever stored.

Emerging Properties in Self-Supervised Vision Transformers. Caron, Touvron, Misra, Jegou, Mairal, Bojanowski,
Joulin, ICCV 2021, arXiv 2104.14294. iBOT (Zhou et al. 2022, arXiv 2111.07832) has this loss for patches, SwAV
(Caron et al. 2020, arXiv 2006.09882) with p_t from Sinkhorn-Knopp, its codes. Rows of s, t [R,K] are the
logits of one crop or patch for K prototypes; c [K] is the teacher's centre.

    loss_i = -sum_k p_t(k) log p_s(k),  p_s = softmax(s_i / tau_s),  p_t = softmax((t_i - c) / tau_t)

    s, t, c      --one pass, K in splits--> maxima and sums [splits,6,R] --merge--> lse [4,R], loss [R]
    s, t, c, lse --one pass---------------> ds = go (p_s - p_t) / tau_s [R,K]

With m = max_k s_k, loss = log sum_k exp((s_k - m) / tau_s) + sum_k p_t(k) (m - s_k) / tau_s: no term is
negative, so nothing cancels however far s is from 0. s_k = -inf costs nothing where p_t(k) = 0, infinity
elsewhere. There are no atomics: two runs agree in every bit.

FLOPs  Two exponentials per element in each pass: the kernels wait for memory.
Bytes  Per element in bf16, 4 read forward, 4 read and 2 written backward. DINO's lines in PyTorch, counted op
       by op, move 100 and keep 8 for the backward pass: 54 GB and 4 GiB at R = 8192, K = 65536.
Saved  s, t, c and lse. Recomputed: p_s and p_t.
Types  Sums are fp32 (fp64 for fp64). s, t and c may differ in type; ds has that of s.
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


# ---- reference: the definition

def prototype_ce_reference(s, t, tau_s, tau_t, center=None):
    return prototype_ce_codes_reference(s, _teacher(s, t, center, tau_t), tau_s)  # [R]


def prototype_ce_codes_reference(s, codes, tau_s):
    p_t, log_p = codes.detach(), F.log_softmax(s.to(_acc(s, codes)) / tau_s, 1)   # [R,K]
    return -torch.where(p_t == 0, 0., p_t * log_p).sum(1)         # [R]      with 0 log 0 = 0


def _teacher(s, t, c, tau_t):
    t = t.to(_acc(s, t)) if c is None else t.to(_acc(s, t)) - c
    return F.softmax(t / tau_t, 1) if tau_t else t                # [R,K]    p_t, or the codes: no tau_t


def _acc(s, t):
    return torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)


# ---- kernels: scale = log2(e) / tau, so that exp(s / tau) = 2^(s scale)

if triton:
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)      # TRITON_INTERPRET=1: kernels on the CPU
    LN2 = tl.constexpr(math.log(2))
    LOW = tl.constexpr(-1e30)                                     # max of nothing: -inf - -inf is no number

    @triton.jit
    def _round(x, dtype: tl.constexpr):
        if INTERPRET and dtype == tl.bfloat16:                    # it truncates; this is nearest even
            bits = x.to(tl.uint32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return x.to(dtype)

    @triton.jit
    def _load(s, t, c, row, col, K, stride_s, stride_t, ACC: tl.constexpr, CODES: tl.constexpr):
        s = tl.load(s + row * stride_s + col, col < K, -float("inf")).to(ACC)
        t = tl.load(t + row * stride_t + col, col < K, 0. if CODES else -float("inf")).to(ACC)
        if c is not None:
            t -= tl.load(c + col, col < K, 0.).to(ACC)            # [1,BK]
        return s, t                                               # [BM,BK], [BM,BK]

    @triton.jit
    def _forward_kernel(s, t, c, part, R, K, stride_s, stride_t, scale_s: tl.float64, scale_t: tl.float64,
                        CODES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
        ACC: tl.constexpr = part.dtype.element_ty
        row = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), R - 1).to(tl.int64)[:, None]    # [BM,1]  i
        scale_s, scale_t = tl.full((1, 1), scale_s, ACC), tl.full((1, 1), scale_t, ACC)  # fp64 until here
        top_s, top_t = tl.full((BM, 1), LOW, ACC), tl.full((BM, 1), LOW, ACC)  # max of s, of t - c, so far
        sum_s, sum_t = tl.zeros((BM, BK), ACC), tl.zeros((BM, BK), ACC)        # exp((s - top_s) / tau_s), e
        gap, hole = tl.zeros((BM, BK), ACC), tl.zeros((BM, BK), ACC)  # e (top_s - s), e where s = -inf
        for start in range(tl.program_id(1) * BK, K, tl.num_programs(1) * BK):
            col = start + tl.arange(0, BK)[None, :]               # [1,BK]   k
            sk, e = _load(s, t, c, row, col, K, stride_s, stride_t, ACC, CODES)
            old, top_s = top_s, tl.maximum(top_s, tl.max(sk, 1)[:, None])
            sum_s = sum_s * tl.exp2((old - top_s) * scale_s) + tl.exp2((sk - top_s) * scale_s)
            gap += (top_s - old) * sum_t
            if not CODES:
                old, top_t = top_t, tl.maximum(top_t, tl.max(e, 1)[:, None])
                alpha = tl.exp2((old - top_t) * scale_t)          # [BM,1]
                sum_t, gap, hole = sum_t * alpha, gap * alpha, hole * alpha
                e = tl.exp2((e - top_t) * scale_t)                # [BM,BK]  exp((t - c - top_t) / tau_t)
            sum_t += e
            gap += e * tl.where(sk == -float("inf"), 0., top_s - sk)
            hole += tl.where(sk == -float("inf"), e, 0.)
        sums = tl.sum(sum_s, 1), tl.sum(sum_t, 1), tl.sum(gap, 1), tl.sum(hole, 1)       # [BM] each
        at = part + tl.program_id(1) * 6 * R + row                # [BM,1]
        tl.store(at, top_s)
        tl.store(at + R, top_t)
        for i in tl.static_range(4):
            tl.store(at + (2 + i) * R, sums[i][:, None])

    @triton.jit
    def _merge_kernel(part, loss, lse, R, scale_s: tl.float64, scale_t: tl.float64,
                      SPLITS: tl.constexpr, CODES: tl.constexpr, BM: tl.constexpr):
        ACC: tl.constexpr = part.dtype.element_ty
        row = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), R - 1).to(tl.int64)   # [BM]     i
        scale_s, scale_t = tl.full((1,), scale_s, ACC), tl.full((1,), scale_t, ACC)      # fp64 until here
        at = part + tl.arange(0, SPLITS)[:, None] * 6 * R + row   # [SPLITS,BM]
        old_s, old_t, sum_s, sum_t = tl.load(at), tl.load(at + R), tl.load(at + 2 * R), tl.load(at + 3 * R)
        top_s, top_t = tl.max(old_s, 0), tl.max(old_t, 0)         # [BM]
        alpha = tl.exp2((old_t - top_t) * scale_t)                # [SPLITS,BM]
        gap = tl.sum((tl.load(at + 4 * R) + (top_s - old_s) * sum_t) * alpha, 0) * (scale_s * LN2)
        hole, sum_t = tl.sum(tl.load(at + 5 * R) * alpha, 0), tl.sum(sum_t * alpha, 0)             # [BM]
        log_s = tl.log2(tl.sum(sum_s * tl.exp2((old_s - top_s) * scale_s), 0))
        ce = log_s * LN2 * sum_t + gap if CODES else log_s * LN2 + gap / sum_t
        tl.store(loss + row, tl.where(hole == 0, ce, float("inf")))               # [BM]
        tl.store(lse + row, top_s)                                # added to its log, as one fp32 number, it
        tl.store(lse + R + row, log_s)                            # would cost p_s 1e-5 at tau = 0.01
        tl.store(lse + 2 * R + row, top_t)
        tl.store(lse + 3 * R + row, sum_t if CODES else tl.log2(sum_t))

    @triton.jit
    def _backward_kernel(s, t, c, lse, go, ds, stride_go, R, K, stride_s, stride_t, scale_s: tl.float64,
                         scale_t: tl.float64, CODES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
        ACC: tl.constexpr = lse.dtype.element_ty
        row = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), R - 1).to(tl.int64)[:, None]    # [BM,1]  i
        col = tl.program_id(1) * BK + tl.arange(0, BK)[None, :]   # [1,BK]   k
        scale_s, scale_t = tl.full((1, 1), scale_s, ACC), tl.full((1, 1), scale_t, ACC)  # fp64 until here
        sk, p_t = _load(s, t, c, row, col, K, stride_s, stride_t, ACC, CODES)
        p_s = tl.exp2((sk - tl.load(lse + row)) * scale_s - tl.load(lse + R + row))      # [BM,BK]
        log_t = tl.load(lse + 3 * R + row)                        # [BM,1]   the sum of codes, if CODES
        if not CODES:
            p_t = tl.exp2((p_t - tl.load(lse + 2 * R + row)) * scale_t - log_t)          # [BM,BK]
        g = p_s * (log_t if CODES else 1.) - p_t                  # [BM,BK]  rounded only below
        g *= tl.load(go + row * stride_go) * (scale_s * LN2)
        tl.store(ds + row * K + col, _round(g, ds.dtype.element_ty), col < K)

    def _forward_triton(s, t, c, tau_s, tau_t):
        s, t, c, numbers, SPLITS, options = _plan(s, t, c, tau_s, tau_t)
        part = torch.empty(SPLITS, 6, len(s), dtype=_acc(s, t), device=s.device)
        loss, lse = torch.empty_like(part[0, 0]), torch.empty_like(part[0, :4])
        with torch.cuda.device_of(s):
            _forward_kernel[triton.cdiv(len(s), options["BM"]), SPLITS](
                s, t, c, part, *numbers, **options)
            _merge_kernel[triton.cdiv(len(s), 32),](
                part, loss, lse, len(s), *numbers[-2:], SPLITS, not tau_t, BM=32, enable_fp_fusion=True)
        return loss, lse

    def _backward_triton(go, s, t, c, lse, tau_s, tau_t):
        s, t, c, numbers, _, options = _plan(s, t, c, tau_s, tau_t)
        ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
        with torch.cuda.device_of(s):
            _backward_kernel[triton.cdiv(len(s), options["BM"]), triton.cdiv(s.shape[1], options["BK"])](
                s, t, c, lse, go, ds, go.stride(0), *numbers, **options)
        return ds


def _plan(s, t, c, tau_s, tau_t):
    s, t, c = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (s, t, c))
    numbers = *s.shape, s.stride(0), t.stride(0), math.log2(math.e) / tau_s, math.log2(math.e) / (tau_t or 1)
    SPLITS, tile = _tiles(*s.shape)
    return s, t, c, numbers, SPLITS, tile | dict(CODES=not tau_t, enable_fp_fusion=True)


def _tiles(R, K):
    """A table, not a tuner: the same bits on every run. None spills on sm_80, 90, 100, gfx90a, gfx942."""
    BK = min(2048, max(16, 1 << (K - 1).bit_length()))
    BM = min(16, 2048 // BK)
    splits = min(64, K // BK, 2048 * BM // max(1, R))             # few rows: several programs for each
    return 1 << max(0, splits.bit_length() - 1), dict(BM=BM, BK=BK, num_warps=8, num_stages=1)


# ---- operators: what PyTorch runs on a device that has no kernel

@torch.library.custom_op(__name__.replace(".", "_") + "::prototype_ce", mutates_args=())
def _forward(s: Tensor, t: Tensor, c: Tensor | None, tau_s: float, tau_t: float) -> tuple[Tensor, Tensor]:
    loss = prototype_ce_codes_reference(s, _teacher(s, t, c, tau_t), tau_s)
    return loss, loss.new_zeros(4, len(s))                        # only the kernel needs lse


@torch.library.custom_op(__name__.replace(".", "_") + "::prototype_ce_backward", mutates_args=())
def _backward(go: Tensor, s: Tensor, t: Tensor, c: Tensor | None, lse: Tensor, tau_s: float, tau_t: float
              ) -> Tensor:
    p_t = _teacher(s, t, c, tau_t)                                # [R,K]
    p_s = F.softmax(s.to(p_t.dtype) / tau_s, 1) * p_t.sum(1, keepdim=True)
    return (go[:, None] * (p_s - p_t) / tau_s).to(s.dtype)


def _save(ctx, inputs, output):
    *tensors, ctx.tau_s, ctx.tau_t = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, go, _):
    return _backward(go, *ctx.saved_tensors, ctx.tau_s, ctx.tau_t), None, None, None, None


def _no_second(ctx, *grads):
    raise NotImplementedError('the kernel has no second derivative: use impl="reference"')


_forward.register_fake(lambda s, t, *_: tuple(s.new_empty(*n, len(s), dtype=_acc(s, t)) for n in ((), (4,))))
_backward.register_fake(lambda go, s, *_: s.new_empty(s.shape))
_forward.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second)
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _forward.register_kernel(_device, _forward_triton)
    _backward.register_kernel(_device, _backward_triton)


# ---- public

def prototype_ce(s: Tensor, t: Tensor, tau_s: float, tau_t: float, center: Tensor | None = None,
                 impl: str = "auto") -> Tensor:
    """Losses, fp32 [R] (fp64 for fp64), of student logits s [R,K] against teacher logits t, centre [K].

    The caller weights and averages them; t and center get no gradient. R = 0 gives an empty result.
    impl: "triton" runs the kernel or says why it cannot; "auto" runs it where it can and the same formulas in
    PyTorch elsewhere; "reference" is plain autograd, the one with second derivatives and a learnable tau_s.
    """
    return _loss(s, t, center, tau_s, tau_t or 0., impl)


def prototype_ce_codes(s: Tensor, codes: Tensor, tau_s: float, impl: str = "auto") -> Tensor:
    """The same with p_t = codes [R,K] as they are, whatever they sum to."""
    return _loss(s, codes, None, tau_s, None, impl)


def _loss(s, t, c, tau_s, tau_t, impl):
    if s.ndim != 2 or t.shape != s.shape or not s.shape[1] or c is not None and c.shape != s.shape[1:]:
        shapes = [list(x.shape) for x in (s, t, c) if x is not None]
        raise ValueError(f"student and teacher must be [R,K], the centre [K], with K >= 1, got {shapes}")
    if not tau_s > 0 or not (tau_t is None or tau_t > 0) or impl != "reference" and isinstance(tau_s, Tensor):
        raise ValueError(f'taus must be positive, and numbers unless impl="reference", got {tau_s}, {tau_t}')
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and s.device.type not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {s.device.type}: {why}')
    if impl == "reference":
        return prototype_ce_codes_reference(s, _teacher(s, t, c, tau_t), tau_s)
    return _forward(s, t.detach(), c if c is None else c.detach(), tau_s, tau_t or 0.)[0]
