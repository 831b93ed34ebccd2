"""Cross-entropy of DINO and iBOT from the features before the last layer: no R x K logits either.

Emerging Properties in Self-Supervised Vision Transformers. Caron, Touvron, Misra, Jegou, Mairal, Bojanowski,
Joulin, ICCV 2021, arXiv 2104.14294. Rows of x_s, x_t [R,D] are the features of one crop or patch, rows
of w_s, w_t [K,D] the prototypes of student and teacher; c [K] is the teacher's centre.

    s = x_s w_s^T, t = x_t w_t^T, p_s = softmax(s_i / tau_s), p_t = softmax((t_i - c) / tau_t)
    loss_i = -sum_k p_t(k) log p_s(k) = log sum_k exp(s_ik / tau_s) - x_s,i . (p_t w_s) / tau_s

    x, w, c --tiles of s and t, K in splits--> maxima and sums [splits,5,R] --merge--> lse [4,R], loss [R]
    x, w, c, lse --the same tiles again--> G = go (p_s - p_t) / tau_s --G w_s----> dx_s [R,D]
                             '--and once more, by blocks of K-----------G^T x_s--> dw_s [K,D]

FLOPs  2RKD for two products forward, three for dx_s and three for dw_s; plain PyTorch has four in all. Each
       slice of 256 columns of a gradient (128 where shared memory is small) computes s and t again.
Bytes  x, w and fp32 gradients. Plain PyTorch keeps 8 per logit: 17 GB at R = 16384, K = 131072.
Saved  x, w, c and lse. Recomputed: s and t. There are no atomics: two runs agree in every bit.
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


# ---- reference: the definition

def prototype_ce_features_reference(x_s, w_s, x_t, w_t, tau_s, tau_t, center=None):
    s, t = (x_s @ w_s.T).to(_acc(x_s)), (x_t @ w_t.T).to(_acc(x_t))               # [R,K]
    p_t = F.softmax((t if center is None else t - center) / tau_t, 1).detach()    # [R,K]
    return F.cross_entropy(s / tau_s, p_t, reduction="none")      # [R]


def _acc(x):
    return torch.promote_types(x.dtype, torch.float32)


# ---- kernels: scale = log2(e) / tau, so that exp(s / tau) = 2^(s scale)

if triton:
    INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)      # TRITON_INTERPRET=1: kernels on the CPU
    LOW = tl.constexpr(-1e30)                                     # not -inf, as 0 * inf is no number

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
    def _rows(x, row, d, D: tl.constexpr):
        return tl.load(x + row.to(tl.int64)[:, None] * D + d, d < D, 0.)

    @triton.jit
    def _logits(a, b, c, i, j, k, real, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                BD: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr):
        s = tl.zeros((BM, BN), ACC)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            s = _mm(_rows(a, i, d, D), _rows(b, j, d, D).T, s, PREC)              # [BM,BN]  a_i . b_j
        if c is not None:
            s -= tl.load(c + k).to(ACC)                           # [1,BN] or [BM,1]
        return tl.where(tl.arange(0, BN) < real, s, LOW)          # of the j, so many are real

    @triton.jit
    def _forward_kernel(x_s, w_s, x_t, w_t, c, part, R, K, scale_s: tl.float64, scale_t: tl.float64,
                        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                        PREC: tl.constexpr):
        ACC: tl.constexpr = part.dtype.element_ty
        i = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), R - 1)           # [BM]     the last repeated
        scale_s, scale_t = tl.full((1,), scale_s, ACC), tl.full((1,), scale_t, ACC)      # fp64 until here
        top_s, top_t = tl.full((BM,), LOW, ACC), tl.full((BM,), LOW, ACC)         # max of s, of t - c, so far
        sum_s, sum_t, gap = tl.zeros((BM,), ACC), tl.zeros((BM,), ACC), tl.zeros((BM,), ACC)
        for start in range(tl.program_id(2) * BN, K, tl.num_programs(2) * BN):
            k = tl.minimum(start + tl.arange(0, BN), K - 1)       # [BN]     the last repeated
            s = _logits(x_s, w_s, None, i, k, k, K - start, D, BM, BN, BD, ACC, PREC)    # [BM,BN]
            old, top_s = top_s, tl.maximum(top_s, tl.max(s, 1))
            e_s = tl.exp2((s - top_s[:, None]) * scale_s)         # [BM,BN]
            sum_s = sum_s * tl.exp2((old - top_s) * scale_s) + tl.sum(e_s, 1)
            gap += (top_s - old) * sum_t                          # [BM]     sum of e_t (top_s - s)
            t = _logits(x_t, w_t, c, i, k, k, K - start, D, BM, BN, BD, ACC, PREC)       # [BM,BN]  t - c
            old, top_t = top_t, tl.maximum(top_t, tl.max(t, 1))
            alpha = tl.exp2((old - top_t) * scale_t)              # [BM]
            e_t = tl.exp2((t - top_t[:, None]) * scale_t)         # [BM,BN]
            sum_t, gap = sum_t * alpha + tl.sum(e_t, 1), gap * alpha + tl.sum(e_t * (top_s[:, None] - s), 1)
        state = top_s, top_t, sum_s, sum_t, gap
        for q in tl.static_range(5):
            tl.store(part + (tl.program_id(2) * 5 + q) * R + i, state[q])

    @triton.jit
    def _backward_kernel(a_s, b_s, a_t, b_t, c, lse, go, out, n, m, scale_s: tl.float64, scale_t: tl.float64,
                         OF_W: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                         BD: tl.constexpr, BO: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = lse.dtype.element_ty
        own = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), n - 1)         # [BM]     the last repeated
        d = (0 if D <= BO else tl.program_id(1) * BO) + tl.arange(0, BO)          # [BO]     columns of out
        scale_s, scale_t = tl.full((1, 1), scale_s, ACC), tl.full((1, 1), scale_t, ACC)  # fp64 until here
        acc = tl.zeros((BM, BO), ACC)                             # [BM,BO]  sum of G_ik w_k, or of G_ik x_i
        for start in range(tl.program_id(2) * BN, m, tl.num_programs(2) * BN):
            other = tl.minimum(start + tl.arange(0, BN), m - 1)   # [BN]     the last repeated
            i, k, R = (other[None, :], own[:, None], m) if OF_W else (own[:, None], other[None, :], n)
            s = _logits(a_s, b_s, None, own, other, k, m - start, D, BM, BN, BD, ACC, PREC)
            g = tl.exp2((s - tl.load(lse + i)) * scale_s - tl.load(lse + 2 * R + i))     # [BM,BN]  p_s
            t = _logits(a_t, b_t, c, own, other, k, m - start, D, BM, BN, BD, ACC, PREC)
            g -= tl.exp2((t - tl.load(lse + R + i)) * scale_t - tl.load(lse + 3 * R + i))
            g = _round(g * tl.load(go + i) * 4096, b_s.dtype.element_ty)         # 2^12: 1/K is normal in fp16
            acc = _mm(g, _rows(b_s, other, d, D), acc, PREC)
        tl.store(out + (tl.program_id(2) * n + own.to(tl.int64))[:, None] * D + d, acc, d < D)

    def _forward_triton(x_s, w_s, x_t, w_t, c, tau_s, tau_t):
        tensors, scales, grid, options = _plan(x_s, w_s, x_t, w_t, c, tau_s, tau_t, backward=False)
        part = torch.empty(grid[2], 5, len(x_s), dtype=_acc(x_s), device=x_s.device)
        with torch.cuda.device_of(x_s):
            _forward_kernel[grid](*tensors, part, len(x_s), len(w_s), *scales, **options)
        old_s, old_t, sum_s, sum_t, gap = part.unbind(1)          # [splits,R] each
        top_s, top_t = old_s.amax(0), old_t.amax(0)               # [R]
        alpha = ((old_t - top_t) / tau_t).exp()                   # [splits,R]
        gap = ((gap + (top_s - old_s) * sum_t) * alpha).sum(0)
        sum_s, sum_t = (sum_s * ((old_s - top_s) / tau_s).exp()).sum(0), (sum_t * alpha).sum(0)
        return sum_s.log() + gap / (sum_t * tau_s), torch.stack([top_s, top_t, sum_s.log2(), sum_t.log2()])

    def _backward_triton(go, x_s, w_s, x_t, w_t, c, lse, tau_s, tau_t, of_w):
        a_s, b_s, a_t, b_t = (w_s, x_s, w_t, x_t) if of_w else (x_s, w_s, x_t, w_t)
        tensors, scales, grid, options = _plan(a_s, b_s, a_t, b_t, c, tau_s, tau_t, backward=True)
        top = go.abs().amax().clamp_min(torch.finfo(go.dtype).tiny)               # [] go / top fits in fp16
        out = torch.empty(grid[2], *a_s.shape, dtype=lse.dtype, device=go.device)
        with torch.cuda.device_of(go):
            _backward_kernel[grid](*tensors, lse, go / top, out, len(a_s), len(b_s), *scales, of_w, **options)
        return (out.sum(0) * (top / (4096 * tau_s))).to(a_s.dtype)


def _plan(a_s, b_s, a_t, b_t, c, tau_s, tau_t, backward, programs=264):           # two for each of 132 SMs
    tensors = [x if x is None else x.contiguous() for x in (a_s, b_s, a_t, b_t, c)]
    tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32" and not torch.version.hip
    D, tile = a_s.shape[1], _tiles(a_s.shape[1], a_s.dtype.itemsize, _shared_memory(a_s), backward)
    grid = -(-len(a_s) // tile["BM"]), -(-D // tile.get("BO", D))
    splits = max(1, min(-(-len(b_s) // tile["BN"]), programs // (grid[0] * grid[1])))
    return (tensors, (math.log2(math.e) / tau_s, math.log2(math.e) / tau_t), (*grid, splits),
            dict(D=D, PREC="tf32" if tf32 else "ieee", enable_fp_fusion=True, **tile))


def _tiles(D, itemsize, shared, backward):
    """A table, not a tuner. At D = 256 none spills on sm_80, 90, 100, gfx90a, gfx942."""
    if itemsize == 8 and shared:                                  # BM, BN, BD, BO, num_warps, num_stages
        tile = 32, 32, 16, 64, 4, 1
    elif itemsize > 2:
        tile = 64, 32 if backward else 64, 16, 256, 8, 2          # one BD: the same bits of s, t both ways
    elif shared < 160_000:
        tile = 64, 32 if backward else 64, 64, 128, 4, 2
    else:
        tile = 64 if backward and D > 128 else 128, 64, 64, 256, 8, 3
    BM, BN, BD, BO, num_warps, num_stages = tile
    options = dict(BM=BM, BN=BN, BD=BD, num_warps=num_warps, num_stages=num_stages)
    return options | dict(BO=min(BO, max(16, 1 << (D - 1).bit_length()))) if backward else options


def _shared_memory(x):
    if x.is_cpu:                                                  # the interpreter
        return 0
    gpu = torch.cuda.get_device_properties(x.device)
    return max(gpu.shared_memory_per_block, getattr(gpu, "shared_memory_per_block_optin", 0))


# ---- operators: what PyTorch runs on a device that has no kernel

@torch.library.custom_op(__name__.replace(".", "_") + "::prototype_ce_features", mutates_args=())
def _forward(x_s: Tensor, w_s: Tensor, x_t: Tensor, w_t: Tensor, c: Tensor | None, tau_s: float,
             tau_t: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(x_s.device.type, enabled=False):
        tensors = [x.to(_acc(x)) for x in (x_s, w_s, x_t, w_t)]
        loss = prototype_ce_features_reference(*tensors, tau_s, tau_t, c)         # [R]
    return loss, loss.new_zeros(4, len(loss))                     # only the kernel needs lse

@torch.library.custom_op(__name__.replace(".", "_") + "::prototype_ce_features_backward", mutates_args=())
def _backward(go: Tensor, x_s: Tensor, w_s: Tensor, x_t: Tensor, w_t: Tensor, c: Tensor | None, lse: Tensor,
              tau_s: float, tau_t: float, of_w: bool) -> Tensor:
    x, w, x_t, w_t = (x.to(go.dtype) for x in (x_s, w_s, x_t, w_t))
    with torch.autocast(x.device.type, enabled=False):            # the caller may be inside of one
        t = x_t @ w_t.T if c is None else x_t @ w_t.T - c         # [R,K]
        g = (F.softmax(x @ w.T / tau_s, 1) - F.softmax(t / tau_t, 1)) * (go / tau_s)[:, None]
        return (g.T @ x if of_w else g @ w).to(x_s.dtype)

def _save(ctx, inputs, output):
    *tensors, ctx.tau_s, ctx.tau_t = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])

def _gradient(ctx, go, _):
    grads = [_backward(go, *ctx.saved_tensors, ctx.tau_s, ctx.tau_t, of_w) if needed else None
             for of_w, needed in zip((False, True), ctx.needs_input_grad, strict=False)]
    return *grads, None, None, None, None, None

def _no_second(ctx, *grads):
    raise NotImplementedError('the kernel has no second derivative: use impl="reference"')

_forward.register_fake(lambda x, *_: tuple(x.new_empty(*n, len(x), dtype=_acc(x)) for n in ((), (4,))))
_backward.register_fake(lambda go, x, w, *rest: x.new_empty((w if rest[-1] else x).shape))
_forward.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second)
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _forward.register_kernel(_device, _forward_triton)
    _backward.register_kernel(_device, _backward_triton)

# ---- public

def prototype_ce_features(x_s: Tensor, w_s: Tensor, x_t: Tensor, w_t: Tensor, tau_s: float, tau_t: float,
                          center: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Losses, fp32 [R] (fp64 for fp64), of features x_s [R,D] and prototypes w_s [K,D] against x_t and w_t.

    The caller normalises rows and weights the losses; teacher and center [K] get no gradient.
    impl: "triton" runs the kernel or says why it cannot; "auto" runs it where it can and the same formulas in
    PyTorch elsewhere; "reference" is plain autograd, the one with second derivatives and a learnable tau_s.
    Autocast casts x and w to its dtype, as it would for a matmul; everything after the product stays fp32.
    """
    tensors, kind = (x_s, w_s, x_t.detach(), w_t.detach()), x_s.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x_s.dtype != torch.float64:
        tensors = [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    R, K, D, got = len(x_s), len(w_s), x_s.shape[-1], [x.shape for x in (*tensors, center) if x is not None]
    if got != [(R, D), (K, D), (R, D), (K, D), (K,)][:len(got)] or not K * D:
        raise ValueError(f"x must be [R,D], w [K,D], center [K], K, D >= 1, got {[list(x) for x in got]}")
    if len({x.dtype for x in tensors}) > 1:
        raise ValueError(f"x and w must have one dtype, got {[x.dtype for x in tensors]}")
    if not tau_s > 0 or not tau_t > 0 or impl != "reference" and isinstance(tau_s, Tensor):
        raise ValueError(f'taus must be positive, and numbers unless impl="reference", got {tau_s}, {tau_t}')
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and kind not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {kind}: {why}')
    if impl == "reference" or not R:
        return prototype_ce_features_reference(*tensors, tau_s, tau_t, center)
    return _forward(*tensors, center if center is None else center.detach(), tau_s, tau_t)[0]
