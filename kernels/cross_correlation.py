"""Barlow Twins and VICReg's covariance term: one low-precision D x D matrix, or none.

Barlow Twins. Zbontar, Jing, Misra, LeCun, Deny, ICML 2021, arXiv 2103.03230, Eq. 1 and 2: a, b [N,D] are the
embeddings of two views, each feature standardised over the N rows as by BatchNorm: biased variance, eps.

    C = a^T b / N, loss = sum_i (C_ii - 1)^2 + lam sum_{i != j} C_ij^2

VICReg. Bardes, Ponce, LeCun, ICLR 2022, arXiv 2105.04906, Eq. 3 and 4: a = b = z less the mean of its rows,
C = a^T a / (N-1), sum_{i != j} C_ij^2 / D. Both are sum_ij W_ij (C - I)_ij^2, W = on where i = j, else off.

    "triton"  a, b --tiles of C--> sum of W (C - I)^2 [tiles] --sum--> loss []
                         '-------> G = W (C - I) [D,D] --2/N b G^T, 2/N a G--> da, db [N,D]
    "gram"    a, b --> A = a a^T, B = b b^T [N,N], C_ii [D] --|C|^2 = <A,B> / N^2--> loss []
                       B, C_ii --2/N (off/N B a + b (on (C_ii - 1) - off C_ii))--> da; db from A alike

"auto" is gram if N < 0.75 D, else triton or its formulas in PyTorch. |C|^2 - sum C_ii^2, in gram, cancels
little there: the rank of C is below N, so |C|^2 > (sum C_ii)^2 / N. No atomics: two runs agree in every bit.

FLOPs  triton 6 N D^2: the three GEMMs of plain PyTorch. gram 8 N^2 D. With a = b: 4 N D^2 and 4 N^2 D.
Bytes  triton, bf16: G, written once and read by two GEMMs, 6 per element of C. The official code, counted op
       by op with C in fp32, moves 142. gram: none of D^2. Both: passes over [N,D], like BatchNorm's.
Saved  a, b and G, or a, b, A, B and D numbers; and z1, z2, as BatchNorm does. Official: 4 bytes per C_ij.
Types  Statistics, sums and C are fp32 (fp64 for fp64). G, A, B have the dtype of a, and a factor that suits
       fp16, for deviations from 0.01 to 30. fp32 GEMMs use TF32 where torch allows it.
"""
import math

import torch
from torch import Tensor

try:
    import triton.knobs
    import triton.language as tl
except ImportError:
    triton = None                                                 # every call then runs in PyTorch


# ---- reference: the definitions

def barlow_twins_loss_reference(z1, z2, lam):
    a, b = _standardise(z1), _standardise(z2)                     # [N,D]
    c = (a.T @ b).to(_acc(a)) / len(a)                            # [D,D]    Barlow Twins, Eq. 2
    on = (c.diagonal() - 1).square().sum()                        # []
    return on + lam * c.fill_diagonal_(0).square().sum()          # []       Eq. 1


def vicreg_covariance_reference(z):
    a = _centre(z)                                                # [N,D]
    c = (a.T @ a).to(_acc(a)) / (len(a) - 1)                      # [D,D]    VICReg, Eq. 3
    return c.fill_diagonal_(0).square().sum() / len(c)            # []       Eq. 4


def _standardise(z):
    one = z.new_ones(z.shape[1], dtype=_acc(z))                   # weights in fp32: so are the statistics
    return torch.batch_norm(z, one, 0 * one, None, None, True, 0., 1e-5, False)   # BatchNorm1d(affine=False)


def _centre(z):
    z32 = z.to(_acc(z))
    return (z32 - z32.mean(0)).to(z.dtype)


def _acc(z):
    return torch.promote_types(z.dtype, torch.float32)


# ---- kernels

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
    def _tile(z, row, col, N, D, stride):
        return tl.load(z + row.to(tl.int64) * stride + col, (row < N) & (col < D), 0.)

    @triton.jit
    def _forward_kernel(a, b, loss, g, N, D, stride_a, stride_b, scale: tl.float64, on: tl.float64,
                        off: tl.float64, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                        PREC: tl.constexpr):
        ACC: tl.constexpr = loss.dtype.element_ty
        tall, wide = tl.num_programs(1), tl.num_programs(0)       # tiles, in bands of 8 for the sake of L2
        y, x = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tall, wide, 8)
        i = (y * BM + tl.arange(0, BM))[:, None]                  # [BM,1]   features of a
        j = (x * BN + tl.arange(0, BN))[None, :]                  # [1,BN]   features of b
        c = tl.zeros((BM, BN), ACC)
        for start in range(0, N, BK):
            row = start + tl.arange(0, BK)                        # [BK]     images
            ai = _tile(a, row[None, :], i, N, D, stride_a)        # [BM,BK]  a^T
            bj = _tile(b, row[:, None], j, N, D, stride_b)        # [BK,BN]
            c = _mm(ai, bj, c, PREC)                              # [BM,BN]  n C
        eye = (i == j) & (j < D)                                  # [BM,BN]  beyond D, C and I are 0
        e = c * tl.full((1, 1), scale, ACC) - tl.where(eye, 1., 0.)               # [BM,BN]  C - I
        ge = tl.where(eye, tl.full((1, 1), on, ACC), tl.full((1, 1), off, ACC)) * e       # [BM,BN]  G
        tl.store(loss + y * wide + x, tl.sum(ge * e))
        tl.store(g + i.to(tl.int64) * D + j, _round(ge, g.dtype.element_ty), (i < D) & (j < D))

    def _forward_triton(a: Tensor, b: Tensor | None, n: int, on: float, off: float) -> tuple[Tensor, Tensor]:
        a, b = (z if z.stride(1) == 1 else z.contiguous() for z in (a, a if b is None else b))
        N, D = a.shape
        tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32" and not torch.version.hip
        options = _tiles(D, a.dtype.itemsize, _shared_memory(a)) | dict(PREC="tf32" if tf32 else "ieee")
        wide, tall = triton.cdiv(D, options["BN"]), triton.cdiv(D, options["BM"])
        loss = torch.empty(tall, wide, dtype=_acc(a), device=a.device)            # a sum a tile
        g = torch.empty(D, D, dtype=a.dtype, device=a.device)
        with torch.cuda.device_of(a):
            _forward_kernel[wide, tall](a, b, loss, g, N, D, a.stride(0), b.stride(0), 1 / n, on, off,
                                        enable_fp_fusion=True, **options)
        return loss.sum(dtype=torch.float64).to(loss.dtype), g


def _tiles(D, itemsize, shared):
    """A table, not a tuner: the same bits on every run. None spills on sm_80, 90, 100, gfx90a, gfx942."""
    if not shared or itemsize == 8:
        return dict(BM=32, BN=32, BK=32, num_warps=4, num_stages=1)
    size = 64 if D <= 1024 else 128                               # few features: more tiles of them
    stages = 2 if shared < 160_000 or (size, itemsize) == (64, 4) else 3
    return dict(BM=size, BN=size, BK=128 // itemsize, num_warps=8, num_stages=stages)


def _shared_memory(z):
    if z.is_cpu:                                                  # the interpreter
        return 0
    gpu = torch.cuda.get_device_properties(z.device)
    return max(gpu.shared_memory_per_block, getattr(gpu, "shared_memory_per_block_optin", 0))


# ---- operators: what PyTorch runs on a device that has no kernel. b: None for b = a

@torch.library.custom_op(__name__.replace(".", "_") + "::cross_correlation", mutates_args=())
def _forward(a: Tensor, b: Tensor | None, n: int, on: float, off: float) -> tuple[Tensor, Tensor]:
    c = _matmul(a.T, a if b is None else b) / n                   # [D,D]    C
    e, g = c.diagonal() - 1, off * c                              # [D], [D,D]  G
    g.diagonal().copy_(on * e)
    return on * e.square().sum() + off * c.fill_diagonal_(0).square().sum(), g.to(a.dtype)


@torch.library.custom_op(__name__.replace(".", "_") + "::gram", mutates_args=())
def _gram(a: Tensor, b: Tensor | None, n: int, on: float, off: float) -> tuple[Tensor, Tensor, Tensor]:
    k = torch.stack([_matmul(z, z.T) for z in (a, b) if z is not None]) / n       # [2,N,N]  A / n, B / n
    c = (a.to(_acc(a)) * (a if b is None else b)).sum(0) / n      # [D]      C_ii
    loss = on * (c - 1).square().sum() + off * ((k[0] * k[-1]).sum() - c.square().sum())
    unit = n / a.shape[1]                                         # for fp16: A / D is of the size of C
    return loss, (off * unit * k).to(a.dtype), unit * (on * (c - 1) - off * c)


@torch.library.custom_op(__name__.replace(".", "_") + "::cross_correlation_backward", mutates_args=())
def _backward(go: Tensor, coef: float, x: Tensor, y: Tensor, z: Tensor | None, d: Tensor | None,
              own: Tensor) -> Tensor:                             # own: only to be asked a second derivative
    xy = _matmul(x, y)                                            # [N,D]    b G^T or a G; B a or A b
    return ((xy if z is None else xy.addcmul_(z, d)) * (go * coef)).to(x.dtype)


def _matmul(x, y):                                                # fp32 to the end, under autocast too
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and x.dtype.itemsize == 2:
            return torch.mm(x, y, out_dtype=torch.float32)
        return x.to(_acc(x)) @ y.to(_acc(y))


def _save(ctx, inputs, output):
    a, b, ctx.n, _, _ = inputs
    ctx.save_for_backward(a, b, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, go, *_):
    a, b, m, *d = ctx.saved_tensors                               # m: G [D,D], or A, B [2,N,N] and d [D]
    coef, other = (4 / ctx.n, a) if b is None else (2 / ctx.n, b)
    if d:
        sides, coef = ((m[-1], a, other, *d), (m[0], b, a, *d)), coef * a.shape[1] / ctx.n
    else:
        sides = (other, m.T, None, None), (a, m, None, None)
    return *(_backward(go, coef, *side, own) if need else None
             for side, own, need in zip(sides, (a, b), ctx.needs_input_grad, strict=False)), None, None, None


def _no_second(ctx, *grads):
    raise NotImplementedError('the kernel has no second derivative: use impl="reference"')


_forward.register_fake(lambda a, *_: (a.new_empty((), dtype=_acc(a)), a.new_empty(a.shape[1], a.shape[1])))
_gram.register_fake(lambda a, b, *_: (a.new_empty((), dtype=_acc(a)), a.new_empty(
    1 if b is None else 2, len(a), len(a)), a.new_empty(a.shape[1], dtype=_acc(a))))
_backward.register_fake(lambda go, coef, x, y, *_: x.new_empty(len(x), y.shape[1]))
_forward.register_autograd(_gradient, setup_context=_save)
_gram.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second)
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _forward.register_kernel(_device, _forward_triton)


# ---- public

def barlow_twins_loss(z1: Tensor, z2: Tensor, lam: float, impl: str = "auto") -> Tensor:
    """Loss, fp32 [] (fp64 for fp64), of raw embeddings z1, z2 [N,D] of two views. N = 1 gives C = 0, loss D.

    impl: "gram"; "triton", or why it cannot run; "auto", the shape's choice of them; "reference", plain
    autograd, the one with second derivatives. Statistics and C are of this call's rows: to gather z over
    processes is the caller's. Autocast casts a and b as it would for a matmul, after the statistics.
    """
    _check(z1, impl)
    if (z2.shape, z2.dtype, z2.device) != (z1.shape, z1.dtype, z1.device):
        raise ValueError(f"z1 {z1.dtype} {list(z1.shape)} and z2 {z2.dtype} {list(z2.shape)} must be alike")
    if not 0 <= lam < math.inf or impl != "reference" and isinstance(lam, Tensor):
        raise ValueError(f'lam must be finite, at least 0, a number unless impl="reference", got {lam}')
    if impl == "reference":
        return barlow_twins_loss_reference(z1, z2, lam)
    return _loss(_standardise(z1), _standardise(z2), len(z1), 1., lam, impl)


def vicreg_covariance(z: Tensor, impl: str = "auto") -> Tensor:
    """VICReg's covariance term, fp32 [] (fp64 for fp64), of raw embeddings z [N,D], N >= 2; impl as above."""
    _check(z, impl, least=2)
    if impl == "reference":
        return vicreg_covariance_reference(z)
    return _loss(_centre(z), None, len(z) - 1, 0., 1 / z.shape[1], impl)


def _loss(a, b, n, on, off, impl):
    kind = a.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and a.dtype != torch.float64:
        a, b = (z if z is None else z.to(torch.get_autocast_dtype(kind)) for z in (a, b))
    unit = 2. ** (13 - math.frexp(max(on, 2**10 * off))[1])       # for fp16: |C_ij| < 2^13 gives |G| < 2^16
    gram = impl == "gram" or impl == "auto" and len(a) < .75 * a.shape[1]
    return (_gram if gram else _forward)(a, b, n, on * unit, off * unit)[0] / unit


def _check(z, impl, least=1):
    if z.ndim != 2 or len(z) < least or not z.numel() or not z.is_floating_point():
        raise ValueError(f"z must be floating [N,D], N >= {least}, D >= 1, got {z.dtype} {list(z.shape)}")
    if impl not in ("auto", "triton", "gram", "reference"):
        raise ValueError(f'impl must be "auto", "triton", "gram" or "reference", got {impl!r}')
    if impl == "triton" and z.device.type not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {z.device.type}: {why}')
