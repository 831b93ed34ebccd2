"""NT-Xent, the loss of SimCLR, without its 2N x 2N matrix of similarities.

A Simple Framework for Contrastive Learning of Visual Representations. Chen, Kornblith, Norouzi, Hinton,
ICML 2020, arXiv 2002.05709, Eq. 1. Rows i and i+N of z [2N,D] are two views of one image.

    loss = mean_i -log(exp(s_i,pos(i)) / sum_{k != i} exp(s_ik)), s_ik = z_i . z_k / tau, pos(i) = i+N mod 2N

    z       --tiles of S = z z^T / tau--> running log-sum-exp --> lse [2,2N], loss [2N] --mean--> []
    z, lse  --the same tiles again------> G = P + P^T - 2 Pos --G z / (2N tau)--> dz [2N,D]

S is symmetric: its column softmax is the transpose of its row softmax P_ik = exp(s_ik - lse_i), so one pass
over blocks of rows gives the whole gradient. There are no atomics: two runs agree in every bit. lse keeps
the maximum of z_i . z_k and the log of the sum apart: as one fp32 number, at tau = 0.01, it costs P 1e-5.

FLOPs  2(2N)^2 D forward, twice that backward: the three GEMMs of plain PyTorch. The backward computes S again
       for each slice of 256 columns of dz (fp32: 128), so above D = 256 it is 1 + ceil(D/256) GEMMs.
Bytes  z, dz and 6N fp32 numbers. Plain PyTorch in bf16, counted op by op, moves 70 bytes per element of S and
       keeps 5 between forward and backward: at 2N = 32768 these are 75 GB moved and 5 GiB kept.
Saved  z and lse. Recomputed: S.
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

def nt_xent_reference(z, tau):
    s = (z @ z.T).to(_acc(z)) / tau                               # [2N,2N]  s_ik
    s = s.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)  # k != i
    pos = torch.arange(len(z), device=z.device).roll(len(z) // 2)                 # [2N]     pos(i)
    return F.cross_entropy(s, pos)                                # []       Eq. 1


def _acc(z):
    return torch.promote_types(z.dtype, torch.float32)


# ---- kernels: c = z_i . z_k, scale = log2(e) / tau, so that exp(s) = 2^(c scale)

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
    def _rows(z, row, d, n, stride, D: tl.constexpr):
        return tl.load(z + row.to(tl.int64)[:, None] * stride + d, (row < n)[:, None] & (d < D), 0.)

    @triton.jit
    def _products(z, row, col, n, stride, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BD: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr):
        c = tl.zeros((BM, BN), ACC)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            zi = _rows(z, row, d, n, stride, D)                   # [BM,BD]
            zk = _rows(z, col, d, n, stride, D)                   # [BN,BD]
            c = _mm(zi, zk.T, c, PREC)                            # [BM,BN]  z_i . z_k
        return tl.where((col < n) & (col != row[:, None]), c, -float("inf"))      # k != i

    @triton.jit
    def _forward_kernel(z, loss, lse, n, stride, scale: tl.float64, D: tl.constexpr, BM: tl.constexpr,
                        BN: tl.constexpr, BD: tl.constexpr, PREC: tl.constexpr):
        ACC: tl.constexpr = lse.dtype.element_ty
        row = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), n - 1)         # [BM]  i, the last repeated
        pos = tl.where(row < n // 2, row + n // 2, row - n // 2)  # [BM]     pos(i)
        scale = tl.full((1,), scale, ACC)                         # [1]      fp64 until here
        top = tl.full((BM,), -float("inf"), ACC)                  # [BM]     max of c over the k seen so far
        total = tl.zeros((BM,), ACC)                              # [BM]     sum of exp(s_ik - top_i / tau)
        c_pos = tl.zeros((BM,), ACC)                              # [BM]     z_i . z_pos(i)
        for start in range(0, n, BN):
            col = start + tl.arange(0, BN)                        # [BN]     k
            c = _products(z, row, col, n, stride, D, BM, BN, BD, ACC, PREC)       # [BM,BN]
            c_pos += tl.sum(tl.where(col == pos[:, None], c, 0.), 1)
            old, top = top, tl.maximum(top, tl.max(c, 1))
            total = total * tl.exp2((old - top) * scale) + tl.sum(tl.exp2((c - top[:, None]) * scale), 1)
        tl.store(lse + row, top)
        tl.store(lse + n + row, tl.log2(total))
        tl.store(loss + row, (top - c_pos) * (scale * LN2) + tl.log(total))        # [BM]  Eq. 1

    @triton.jit
    def _backward_kernel(z, lse, go, dz, n, stride, scale: tl.float64, coef: tl.float64, D: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
                         PREC: tl.constexpr):
        ACC: tl.constexpr = lse.dtype.element_ty
        row = tl.minimum(tl.program_id(0) * BM + tl.arange(0, BM), n - 1)         # [BM]  i, the last repeated
        out = (0 if D <= BO else tl.program_id(1) * BO) + tl.arange(0, BO)        # [BO]  columns of dz
        pos = tl.where(row < n // 2, row + n // 2, row - n // 2)  # [BM]     pos(i)
        top_i = tl.load(lse + row)[:, None]                       # [BM,1]
        log_i = tl.load(lse + n + row)[:, None]                   # [BM,1]
        scale = tl.full((1,), scale, ACC)                         # [1]      fp64 until here
        acc = tl.zeros((BM, BO), ACC)                             # [BM,BO]  sum over k of G_ik z_k
        for start in range(0, n, BN):
            col = start + tl.arange(0, BN)                        # [BN]     k
            top_k = tl.load(lse + col, col < n, 0.)               # [BN]
            log_k = tl.load(lse + n + col, col < n, 0.)           # [BN]
            c = _products(z, row, col, n, stride, D, BM, BN, BD, ACC, PREC)       # [BM,BN]
            p = tl.exp2((c - top_i) * scale - log_i)              # [BM,BN]  P
            pt = tl.exp2((c - top_k) * scale - log_k)             # [BM,BN]  P^T
            g = p + pt - tl.where(col == pos[:, None], 2., 0.)    # [BM,BN]  G, rounded only after
            g = _round(g * 4096, z.dtype.element_ty)              # 2^12: keeps P ~ 1/2N normal in fp16
            acc = _mm(g, _rows(z, col, out, n, stride, D), acc, PREC)
        acc *= tl.load(go) * tl.full((1, 1), coef / 4096, ACC)    # coef = 1 / (2N tau)
        at = dz + row.to(tl.int64)[:, None] * D + out
        tl.store(at, _round(acc, z.dtype.element_ty), out < D)

    def _forward_triton(z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        z, options = _plan(z, backward=False)
        loss = torch.empty(len(z), dtype=_acc(z), device=z.device)
        lse = torch.empty(2, len(z), dtype=_acc(z), device=z.device)
        with torch.cuda.device_of(z):
            _forward_kernel[(triton.cdiv(len(z), options["BM"]),)](
                z, loss, lse, len(z), z.stride(0), math.log2(math.e) / tau, **options)
        return loss.mean(dtype=torch.float64).to(loss.dtype), lse

    def _backward_triton(go: Tensor, z: Tensor, lse: Tensor, tau: float) -> Tensor:
        z, options = _plan(z, backward=True)
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        with torch.cuda.device_of(z):
            _backward_kernel[triton.cdiv(len(z), options["BM"]), triton.cdiv(z.shape[1], options["BO"])](
                z, lse, go, dz, len(z), z.stride(0), math.log2(math.e) / tau, 1 / (len(z) * tau), **options)
        return dz


def _plan(z, backward):
    z = z if z.stride(1) == 1 else z.contiguous()
    tf32 = getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "tf32" and not torch.version.hip
    return z, dict(D=z.shape[1], PREC="tf32" if tf32 else "ieee", enable_fp_fusion=True,
                   **_tiles(*z.shape, z.dtype.itemsize, _shared_memory(z), backward))


def _tiles(n, D, itemsize, shared, backward):
    """A table, not a tuner: the same bits on every run. None spills on sm_80, 90, 100, gfx90a, gfx942."""
    wide, pow2, few = D > 128, max(16, 1 << (D - 1).bit_length()), n <= 131 * 128    # less than one each SM
    if not shared:                                                # BM, BN, BD, BO, num_warps, num_stages
        tile = 32, 32, 64, 64, 4, 1
    elif itemsize == 8:
        tile = 32, 32, 16, 64, 4, 1
    elif itemsize == 4:
        tile = 64, 16 if backward else 64, 16 if backward else 32, 128, 8, 2
    elif shared < 160_000 and wide:
        tile = 64, 64, 64, 256, 8, 2
    elif shared < 160_000:
        tile = 64, 32 if backward else 64, 128, 128, 4, 2
    elif backward:
        tile = 64 if wide or few else 128, 64, 64 if wide else 128, 256, 8, 3
    else:
        tile = 64 if few else 128, 128 if wide and shared > 200_000 else 64, 64 if wide else 128, 256, 8, 3
    BM, BN, BD, BO, num_warps, num_stages = tile
    options = dict(BM=BM, BN=BN, BD=min(BD, pow2), num_warps=num_warps, num_stages=num_stages)
    return options | dict(BO=min(BO, pow2)) if backward else options


def _shared_memory(z):
    if z.is_cpu:                                                  # the interpreter
        return 0
    gpu = torch.cuda.get_device_properties(z.device)
    return max(gpu.shared_memory_per_block, getattr(gpu, "shared_memory_per_block_optin", 0))


# ---- operators: what PyTorch runs on a device that has no kernel

@torch.library.custom_op(__name__.replace(".", "_") + "::nt_xent", mutates_args=())
def _forward(z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    z = z.to(_acc(z))
    c = (z @ z.T).fill_diagonal_(-math.inf)                       # [2N,2N]
    top = c.amax(1)                                               # [2N]
    log = ((c - top[:, None]) / tau).exp().sum(1).log2()          # [2N]
    loss = (top - c.diagonal(len(z) // 2).repeat(2)) / tau + log * math.log(2)
    return loss.mean(), torch.stack([top, log])

@torch.library.custom_op(__name__.replace(".", "_") + "::nt_xent_backward", mutates_args=())
def _backward(go: Tensor, z: Tensor, lse: Tensor, tau: float) -> Tensor:
    z32, n = z.to(_acc(z)), len(z)
    top, log = lse[:, :, None]                                    # [2N,1], [2N,1]
    with torch.autocast(z.device.type, enabled=False):            # the caller may be inside of one
        c = (z32 @ z32.T).fill_diagonal_(-math.inf)               # [2N,2N]
        p = ((c - top) / tau - log * math.log(2)).exp()           # [2N,2N]
        g = p + p.T - 2 * torch.eye(n, dtype=p.dtype, device=p.device).roll(n // 2, 0)
        return (g @ z32 * (go / (n * tau))).to(z.dtype)           # [2N,D]

def _save(ctx, inputs, output):
    z, ctx.tau = inputs
    ctx.save_for_backward(z, output[1])
    ctx.mark_non_differentiable(output[1])

def _gradient(ctx, go, _):
    return _backward(go, *ctx.saved_tensors, ctx.tau), None

def _no_second(ctx, *grads):
    raise NotImplementedError('the kernel has no second derivative: use nt_xent(z, tau, impl="reference")')

_forward.register_fake(lambda z, tau: (z.new_empty((), dtype=_acc(z)), z.new_empty(2, len(z), dtype=_acc(z))))
_backward.register_fake(lambda go, z, lse, tau: z.new_empty(z.shape))
_forward.register_autograd(_gradient, setup_context=_save)
_backward.register_autograd(_no_second)
DEVICES = () if not triton else ("cuda", "cpu") if INTERPRET else ("cuda",)       # ROCm calls itself cuda too
for _device in DEVICES:
    _forward.register_kernel(_device, _forward_triton)
    _backward.register_kernel(_device, _backward_triton)

# ---- public

def nt_xent(z: Tensor, tau: float, impl: str = "auto") -> Tensor:
    """Mean loss, fp32 [] (fp64 for fp64), of embeddings z [2N,D] that the caller has normalised.

    impl: "triton" runs the kernel or says why it cannot; "auto" runs it where it can and the same formulas in
    PyTorch elsewhere; "reference" is plain autograd, the one with second derivatives and a learnable tau.
    Autocast casts z to its dtype, as it would for a matmul; everything after the product stays fp32.
    """
    if z.ndim != 2 or len(z) % 2 or not z.numel():
        raise ValueError(f"z must be [2N,D] with N, D >= 1, got {list(z.shape)}")
    if not tau > 0 or impl != "reference" and isinstance(tau, Tensor):
        raise ValueError(f'tau must be positive, and a number unless impl="reference", got {tau}')
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and z.device.type not in DEVICES:
        why = "no GPU there, nor TRITON_INTERPRET=1 at import" if triton else "triton is missing or too old"
        raise RuntimeError(f'impl="triton" cannot run on {z.device.type}: {why}')
    kind = z.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and z.dtype != torch.float64:
        with torch.autocast(kind, enabled=False):
            return nt_xent(z.to(torch.get_autocast_dtype(kind)), tau, impl)
    return nt_xent_reference(z, tau) if impl == "reference" else _forward(z, tau)[0]
