"""What the tests of every kernel share: awkward inputs, guarded memory, and the comparison with PyTorch.

A kernel passes when its error against float64 is at most twice that of plain PyTorch in the same dtype, plus
one ulp of the largest magnitude that took part. Run in float64, where nothing can hide, it agrees to 1e-12.
"""
import contextlib
import math
import time
import warnings
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float32, torch.float16, torch.bfloat16]
SCALES = [.01, 1., 30.]
LAYOUTS = ["contiguous", "row-strided", "transposed", "offset", "expanded"]
MARGIN = 64                                                       # guard elements on each side of a buffer


# ---- inputs

def sizes(block, beyond=2):
    """For an axis tiled by block: 1, primes, the block and its neighbours, past two blocks."""
    return st.sampled_from([1, 2, 3, 7, block - 1, block, block + 1, beyond * block + 1, beyond * block + 5])


def randn(*shape, seed=0, scale=1., dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * scale).to(DEVICE, dtype)


def layout(x, kind):
    """The values of x (of its first row, if expanded) in this layout, with NaN around them in memory."""
    if kind == "expanded":
        return layout(x[:1], "offset").expand_as(x)
    if kind == "transposed":
        return layout(x.mT, "row-strided").mT
    wide = (*x.shape[:-1], x.shape[-1] + (5 if kind == "row-strided" else 0))
    n, start = math.prod(wide), MARGIN + (kind == "offset")
    arena = torch.full((n + 2 * MARGIN + 1,), math.nan, dtype=x.dtype, device=x.device)
    return arena[start:start + n].view(wide)[..., :x.shape[-1]].copy_(x)


@contextlib.contextmanager
def guarded():
    """torch.empty gives NaN between two canaries: what is not written shows, a write outside fails here."""
    arenas, empty = [], torch.empty

    def guard(*shape, **options):
        shape = empty(*shape, device="meta").shape
        arena = torch.full((shape.numel() + 2 * MARGIN,), 12345., **options)
        body = arena[MARGIN:MARGIN + shape.numel()]
        arenas.append((arena, shape.numel()))
        return body.fill_(math.nan).view(shape)

    with mock.patch("torch.empty", guard), mock.patch("torch.empty_like", lambda x, **o: guard(
            x.shape, **dict(dtype=x.dtype, device=x.device) | o)):
        yield
    for arena, n in arenas:
        canary = torch.full_like(arena[:MARGIN], 12345)
        assert arena[:MARGIN].equal(canary) and arena[MARGIN + n:].equal(canary), "write outside the output"


# ---- comparison

def outputs(fn, leaves):
    values = fn(*leaves)
    return values if isinstance(values, tuple) else (values,)


def run(fn, inputs, go=None):
    """[outputs of fn, gradient of each floating input], in guarded memory. go: the gradients that come in, a
    number for all, or a tensor for each output that has one; by default ones, as .sum() sends them."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    with guarded():
        values = outputs(fn, leaves)
        wanted, inputs = [v for v in values if v.requires_grad], [x for x in leaves if x.requires_grad]
        if not isinstance(go, list | tuple):
            go = [torch.full_like(v, 1 if go is None else go) for v in wanted]
        go = [g.to(v.dtype) for g, v in zip(go, wanted, strict=True)]
        grads = torch.autograd.grad(wanted, inputs, go) if wanted else ()
        return [*(v.detach() for v in values), *grads]


def ulp(largest, dtype):
    return torch.finfo(dtype).eps * 2. ** math.floor(math.log2(max(largest, torch.finfo(dtype).tiny)))


def compare(kernel, reference, inputs, largest=None, go=None):
    """Every output and gradient, kernel against reference; largest: for each, of the terms it is a sum of."""
    exact = run(reference, [x.double() if x.is_floating_point() else x for x in inputs], go)
    plain = run(reference, inputs, go)
    for i, (e, p, k) in enumerate(zip(exact, plain, run(kernel, inputs, go), strict=True)):
        name = f"result {i} (outputs, then gradients)"
        assert (k.dtype, k.shape) == (p.dtype, p.shape), name
        if not k.is_floating_point() or not k.numel():
            assert k.equal(e), name
            continue
        size = max(e.abs().max().item(), largest[i] if largest else 0)
        assert k.isfinite().all(), f"{name} is not finite"
        error, allowed = (k.double() - e).abs().max().item(), (p.double() - e).abs().max().item()
        if k.dtype == torch.float64:
            bound = 1e-12 * max(1, size)
        else:
            allowed = math.inf if math.isnan(allowed) else allowed
            bound = 2 * allowed + ulp(size, k.dtype)
        assert error <= bound, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}, bound {bound:.2e}"


# ---- what PyTorch asks of an operator

def check_compiles(fn, *inputs):
    """No graph break, and the same bits with it as without."""
    results = []
    for f in fn, torch.compile(fn, backend="aot_eager", fullgraph=True):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
            values = outputs(f, leaves)
        total = sum(v.sum() for v in values if v.requires_grad)
        results.append([*values, *torch.autograd.grad(total, [x for x in leaves if x.requires_grad])])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def check_deterministic(fn, *inputs, times=3):
    first = run(fn, inputs)
    for _ in range(times - 1):
        assert all(a.equal(b) for a, b in zip(first, run(fn, inputs), strict=True))


def check_zero_stride_grad(fn, *inputs):
    """.sum().backward() sends a gradient of stride 0."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    value = outputs(fn, leaves)[0]
    leaves = [x for x in leaves if x.requires_grad]
    dense = torch.autograd.grad(value, leaves, torch.ones_like(value), retain_graph=True)
    flat = torch.autograd.grad(value, leaves, value.new_ones(()).expand_as(value))
    assert all(a.equal(b) for a, b in zip(dense, flat, strict=True))


def check_no_double_backward(fn, *inputs):
    """The error says what to do about it."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    total = sum(v.sum() for v in outputs(fn, leaves) if v.requires_grad)
    grads = torch.autograd.grad(total, [x for x in leaves if x.requires_grad], create_graph=True)
    with pytest.raises(NotImplementedError, match='impl="reference"'):
        sum(g.sum() for g in grads).backward()


def check_backward_inside_autocast(fn, operators, *inputs):
    """loss.backward() may stand inside of it: the same bits, from the kernels and from what runs without."""
    for enabled in True, False:
        with contextlib.ExitStack() as stack:
            for operator in operators:
                stack.enter_context(operator.set_kernel_enabled(DEVICE, enabled=enabled))
            leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            total = sum(v.sum() for v in outputs(fn, leaves) if v.requires_grad)
            leaves = [x for x in leaves if x.requires_grad]
            want = torch.autograd.grad(total, leaves, retain_graph=True)
            with torch.autocast(DEVICE, torch.bfloat16):
                got = torch.autograd.grad(total, leaves)
        assert all(a.equal(b) for a, b in zip(want, got, strict=True))


# ---- two processes

def two_processes(worker, folder):
    """worker(rank, folder) in each, which leaves folder/rank.pt -> what they left."""
    context, late = mp.spawn(worker, (folder,), nprocs=2, join=False), time.monotonic() + 120
    while not context.join(1):
        if time.monotonic() > late:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return [torch.load(folder / f"{rank}.pt", weights_only=True, map_location=DEVICE) for rank in (0, 1)]
