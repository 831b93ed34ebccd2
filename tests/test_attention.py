"""Attention: the kernel against its definition, PyTorch's own, plain loops, and by its symmetries."""
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, LAYOUTS, LOW, compare, layout, randn, run, sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention as module
from kernels.attention import attention, attention_reference

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
TILES = [dict(BM=16, BN=16), dict(BM=16, BN=32), dict(BM=32, BN=16)]
HEADS = st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)])         # B, H
WIDTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 33, 40, 80, 128])  # d
HIDDEN = st.sampled_from([None, None, .4, 1.])                    # of the first image, this part of the keys
ROWS = st.sampled_from([None, [], [0], [-1, 0, 0]])
KINDS = st.permutations(LAYOUTS)                                  # of q, k, v
SEEDS = st.integers(0, 2**16)


def tiles(t):
    """Run with this tile, whatever the table says."""
    return mock.patch.object(module, "_tiles", lambda *_: t | dict(num_warps=4, num_stages=1))


def qkv(N, M, d, B=1, H=1, seed=0, dtype=torch.float64):
    return [randn(B, H, n, d, seed=seed + i, dtype=dtype) for i, n in enumerate((N, M, M))]


def hide(B, M, part, seed=0):
    """The first image loses this part of its keys, the others lose one key."""
    if part is None:
        return None
    hidden = torch.rand(B, M, generator=torch.Generator().manual_seed(seed)) < part
    hidden[1:] = torch.arange(M) == M // 2
    return hidden.to(DEVICE)


def index(rows):
    return None if rows is None else torch.tensor(rows, dtype=torch.int64, device=DEVICE)


def terms(q, k, v, go, rows=None, scale=None, **options):
    """Of each sum the largest value without its cancellation: the formulas again, on absolute values.
    In fp32, P has three roundings of its own and passes on that of S; in 16 bits, the inputs' are above them.
    """
    everyone, scale, dtype = torch.arange(q.shape[2], device=DEVICE), scale or q.shape[3]**-.5, q.dtype
    q, k, v, go = (x.detach().double() for x in (q, k, v, go))
    p = attention_reference(q, k, v, rows=everyone, scale=scale, **options)[1]
    q, k, v, go = (x.abs() for x in (q, k, v, go))
    p = p * (2 + scale * q @ k.mT) if dtype == torch.float32 else p
    ds = p * (go @ v.mT + (go * (p @ v)).sum(-1, keepdim=True)) * scale           # dp and delta
    sums = [p @ v, *[p] * (rows is not None), ds @ k, ds.mT @ q, p.mT @ go]
    return [x.max().item() for x in sums]


def three_way(q, k, v, kernel=attention, seed=9, **options):
    go = randn(*q.shape, seed=seed, dtype=q.dtype)
    compare(partial(kernel, **options), partial(attention_reference, **options), [q, k, v],
            terms(q, k, v, go, **options), [go])


def same(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---- against the definition

@settings(max_examples=20)
@given(HEADS, sizes(16), sizes(16), WIDTHS, st.booleans(), HIDDEN, ROWS, KINDS,
       st.sampled_from(TILES), SEEDS)
def test_float64(heads, N, M, d, causal, part, rows, kinds, tile, seed):
    q, k, v = map(layout, qkv(N, M, d, *heads, seed), kinds)
    with tiles(tile):
        three_way(q, k, v, causal=causal, padding=hide(len(q), M, part, seed), rows=index(rows))


@settings(max_examples=25)
@given(HEADS, sizes(16), sizes(16), WIDTHS, st.booleans(), HIDDEN, ROWS, KINDS,
       st.sampled_from(TILES), SEEDS, st.sampled_from(LOW), st.sampled_from(harness.SCALES))
def test_three_way(heads, N, M, d, causal, part, rows, kinds, tile, seed, dtype, size):
    q, k, v = map(layout, [(size * x).to(dtype) for x in qkv(N, M, d, *heads, seed)], kinds)
    with tiles(tile):                                             # beyond, logits are noise in fp32
        three_way(q, k, v, causal=causal, padding=hide(len(q), M, part, seed), rows=index(rows),
                  scale=1 / (d**.5 * max(1, size)**2))


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("d", [64, 80])
def test_tiles_of_the_table(d, dtype):
    three_way(*(x.to(dtype) for x in qkv(67, 70, d)), rows=index([0]), causal=d == 80)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_operators_without_kernel(dtype):
    off = partial(module._forward.set_kernel_enabled, DEVICE, enabled=False)
    with off(), module._backward.set_kernel_enabled(DEVICE, enabled=False):
        with mock.patch.object(module, "_launch", side_effect=AssertionError("the kernel ran")):
            x = [layout(x.to(dtype), "transposed") for x in qkv(17, 34, 5, 2, 3)]
            three_way(*x, padding=hide(2, 34, 1.), rows=index([3, 0]))
            three_way(*x, causal=True)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_operators_without_kernel_stay_fp32_under_autocast(low):
    x, f = qkv(17, 20, 5, dtype=low), partial(attention, rows=index([3, 0]))
    with module._forward.set_kernel_enabled(DEVICE, enabled=False):
        want = f(*x)
        with torch.autocast(DEVICE, low):
            for y in x, [z.float() for z in x]:
                assert all(a.equal(b) for a, b in zip(f(*y), want, strict=True))


@pytest.mark.parametrize("causal, part, scale", [(False, None, None), (True, None, .3), (False, .4, 2.)])
def test_pytorch(causal, part, scale):
    """PyTorch's own operator, in float64. Its causal is aligned at the start, so N = M there."""
    N, M = (19, 19) if causal else (18, 21)
    x, go, padding = qkv(N, M, 7, 2, 3), randn(2, 3, N, 7, seed=5), hide(2, M, part)

    def pytorch(q, k, v):
        mask = None if padding is None else ~padding[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)

    with tiles(TILES[0]):
        ours = run(partial(attention, causal=causal, padding=padding, scale=scale), x, [go])
    same(ours, run(pytorch, x, [go]))


def paper(q, k, v, scale, sees):
    """out_i = sum_j P_ij v_j over numbers, for one head."""
    q, k, v, out = q[0, 0].tolist(), k[0, 0].tolist(), v[0, 0].tolist(), []
    for i, qi in enumerate(q):
        e = {j: math.exp(scale * sum(a * b for a, b in zip(qi, kj, strict=True)))
             for j, kj in enumerate(k) if sees(i, j)}
        out.append([sum(e[j] * v[j][d] for j in e) / max(sum(e.values()), 1e-99) for d in range(len(v[0]))])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("N, M, d", [(5, 5, 2), (2, 4, 3), (4, 2, 1)])
def test_paper_formula(N, M, d, impl):
    """Causal, aligned at the end when N is not M, the second key hidden. Slopes: central differences."""
    x, go = qkv(N, M, d, seed=N), randn(1, 1, N, d, seed=9)
    padding = torch.arange(M, device=DEVICE)[None] == 1
    f = partial(attention, causal=True, padding=padding, scale=.7, impl=impl)

    def value(*x):
        return paper(*x, .7, lambda i, j: j <= i + M - N and j != 1).to(DEVICE)

    out, *grads = run(f, x, [go])
    same([out[0, 0]], [value(*x)], 1e-13)
    for n, grad in enumerate(grads):
        for at in [(0, 0, 0, 0), (0, 0, 1, d - 1), (0, 0, x[n].shape[2] - 1, 0)]:
            step = torch.zeros_like(x[n])
            step[at] = 1e-5
            up, down = ([*x[:n], x[n] + sign * step, *x[n + 1:]] for sign in (1, -1))
            slope = ((value(*up) - value(*down)) * go[0, 0]).sum().item() / 2e-5
            assert grad[at].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


# ---- values known by hand

def test_one_key():
    """M=1: P = 1, whatever the logit, so out = v and no gradient reaches q or k."""
    for dtype in [*LOW, torch.float64]:
        q, k, v = qkv(3, 1, 5, dtype=dtype)
        q, go = 1e4 * q, torch.ones_like(q)
        out, maps, dq, dk, dv = run(partial(attention, rows=index([1])), [q, k, v], [go])
        assert out.equal(v.expand_as(out)) and maps.eq(1).all() and dv.eq(3).all()
        ds = harness.ulp(v.abs().sum().item(), module._acc(q))    # dout . v and delta, summed in two orders
        assert dq.abs().max() <= ds * k.abs().max() and dk.abs().max() <= 3 * ds * q.abs().max()


def test_two_keys():
    """A query and its negative: P is a logistic function, and dS = P (1 - P) (dout v_0 - dout v_1)."""
    pairs = torch.tensor([[2., -2], [1, -.5], [3, -1]], dtype=torch.float64, device=DEVICE)
    q, k, v = pairs[:, None, None, :, None]
    x, go = [q, k, v], torch.tensor([1., 2], dtype=torch.float64, device=DEVICE)
    out, maps, *grads = run(partial(attention, rows=index([1, 0]), scale=.5), x, [go.view_as(q)])
    p = torch.sigmoid(.5 * 1.5 * pairs[0])                        # P_i0, of s_i0 - s_i1
    ds = go * p * (1 - p) * 4
    dk = .5 * (ds @ pairs[0])
    want = [.5 * 1.5 * ds, torch.stack([dk, -dk]), torch.stack([go @ p, go @ (1 - p)])]
    same([y.flatten() for y in (out, maps[..., 0], *grads)], [4 * p - 1, p.flip(0), *want])


@pytest.mark.parametrize("causal", [False, True])
def test_equal_logits(causal):
    """q = 0: the mean of the values that are seen; a value gets 1 / so many from each query that sees it."""
    _, k, v = qkv(37, 37, 5)
    with tiles(TILES[0]):
        out, *_, dv = run(partial(attention, causal=causal), [torch.zeros_like(v), k, v])
    seen = torch.ones(37, 37, dtype=torch.float64, device=DEVICE)
    p = seen.tril() / seen.tril().sum(1, keepdim=True) if causal else seen / 37
    same([out, dv], [p @ v, p.sum(0)[:, None].expand_as(v)])


# ---- maps

@settings(max_examples=10)
@given(sizes(16), sizes(16), st.booleans(), HIDDEN, st.sampled_from([*LOW, torch.float64]), SEEDS)
def test_maps(N, M, causal, part, dtype, seed):
    """Distributions over the keys that are seen, 0 on the others, and what out was averaged with."""
    x, padding = qkv(N, M, 8, 2, 1, seed, dtype), hide(2, M, part, seed)
    rows = [N - 1, 0, N // 2, 0, -1]
    with tiles(TILES[seed % 3]):
        out, maps = attention(*x, causal, padding, index(rows))
    assert maps.dtype == module._acc(x[0]) and not maps.requires_grad and maps.shape == (2, 1, 5, M)
    close = partial(same, tolerance=1e-12 if dtype == torch.float64 else 1e-6)
    close([maps[:, :, 1], maps[:, :, 0]], [maps[:, :, 3], maps[:, :, 4]])
    seen = torch.ones(2, 1, 5, M, dtype=torch.bool, device=DEVICE)
    for r, i in enumerate(rows):
        seen[:, :, r] &= torch.arange(M, device=DEVICE) <= i % N + M - N if causal else True
    seen &= True if padding is None else ~padding[:, None, None]
    assert not maps[~seen].any() and (maps >= 0).all()
    close([maps.sum(-1)], [seen.any(-1).to(maps.dtype)])
    error = (maps.double() @ x[2].double() - out[:, :, rows].double()).abs().max().item()
    assert error <= 1e-12 + 8 * x[2].abs().max().item() * (torch.finfo(dtype).eps if dtype in LOW else 0)


def test_rows_change_nothing_else():
    x = qkv(35, 19, 5, 1, 2)
    with tiles(TILES[0]):
        plain, (out, maps, *grads) = (run(partial(attention, rows=index(r)), x) for r in (None, [34, 2]))
        none = attention(*x, rows=index([]))[1]
    same(plain, [out, *grads], 1e-14)
    assert maps.shape == (1, 2, 2, 19) and none.shape == (1, 2, 0, 19)


def test_maps_of_very_sure_queries():
    """Logits near 1e4: fp32 has steps of 1e-3 there, yet each row still sums to 1 and dv to its dout."""
    q, k, v = qkv(33, 37, 16, dtype=torch.float32)
    q, k = 1e4 * F.normalize(q, dim=-1), F.normalize(k[:, :, :1], dim=-1) + 1e-4 * k
    with tiles(TILES[0]):
        _, maps, _, _, dv = run(partial(attention, rows=torch.arange(33, device=DEVICE), scale=1.), [q, k, v])
    same([maps.sum(-1), dv.sum((2, 3)) / 16 / 33], [torch.ones_like(maps[..., 0]), dv.new_ones(1, 1)], 2e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="there a wrong index is an assertion of the device")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_rows_that_do_not_exist(impl):
    with pytest.raises(IndexError):
        attention(*qkv(3, 4, 2), rows=index([3]), impl=impl)


# ---- symmetries and conservation laws

@settings(max_examples=4)
@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from([3, 17]), SEEDS)
def test_symmetries(N, M, d, seed):
    x, go = qkv(N, M, d, 1, 2, seed), randn(1, 2, N, d, seed=seed + 5)
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.randperm(N, generator=generator), torch.randperm(M, generator=generator)
    turn, c = torch.linalg.qr(randn(d, d, seed=seed))[0], randn(d, seed=seed + 6)
    with tiles(TILES[seed % 3]):
        q, k, v = x
        out, dq, dk, dv = run(attention, x, [go])

        def check(x, go, *want):
            same(run(attention, x, [go]), want, 1e-11)

        check([q, k[:, :, cols], v[:, :, cols]], go, out, dq, dk[:, :, cols], dv[:, :, cols])
        check([q[:, :, rows], k, v], go[:, :, rows], out[:, :, rows], dq[:, :, rows], dk, dv)
        check([q, k + c, v], go, out, dq, dk, dv)                 # q_i . c is the same for all j
        check([q @ turn, k @ turn, v], go, out, dq @ turn, dk @ turn, dv)
        check([y.flip(1) for y in x], go.flip(1), *(y.flip(1) for y in (out, dq, dk, dv)))    # heads apart
    same([dk.sum(2), dv.sum(2)], [torch.zeros_like(c).expand(1, 2, d), go.sum(2)], 1e-11)
    same([(q * dq).sum((2, 3))], [(k * dk).sum((2, 3))], 1e-11)   # both are the sum of dS * S


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_constant_values(dtype):
    """v_j = v: out = v, and no gradient reaches q and k."""
    q, k, v = qkv(33, 37, 7, dtype=dtype)
    v, go = v[:, :, :1].expand_as(v), randn(1, 1, 33, 7, seed=8, dtype=dtype)
    with tiles(TILES[0]):
        out, dq, dk, _ = run(attention, [q, k, v], [go])
    eps = max(torch.finfo(dtype).eps, 1e-14)
    assert (out - v[:, :, :1]).abs().max() <= 2 * eps * v.abs().max()
    assert dq.abs().max() <= 8 * eps * (go @ v.mT).abs().max() * k.abs().max()
    assert dk.abs().max() <= 8 * eps * (go @ v.mT).abs().max() * q.abs().max()


# ---- what is hidden

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("N, M", [(33, 33), (20, 35)])
def test_causal(N, M, dtype):
    """Key and value j reach no query before them, in any bit, and get no gradient from there."""
    x, go = qkv(N, M, 5, dtype=dtype), randn(1, 1, N, 5, seed=8, dtype=dtype)
    f = partial(attention, causal=True)
    with tiles(TILES[0]):
        out, dq, *_ = run(f, x, [go])
        for j in M - 1, M - 17:
            k, v = x[1].clone(), x[2].clone()
            k[:, :, j], v[:, :, j] = 100, -100
            other, other_dq, *_ = run(f, [x[0], k, v], [go])
            before = max(0, j - (M - N))
            for a, b in (out, other), (dq, other_dq):
                assert a[:, :, :before].equal(b[:, :, :before]) and not a[:, :, before].equal(b[:, :, before])
            late = torch.where(torch.arange(N, device=DEVICE)[:, None] < before, go, 0)
            *_, dk, dv = run(f, x, [late])
            assert not dk[:, :, j:].any() and not dv[:, :, j:].any() and dv[:, :, :j].any() == (before > 0)


def test_causal_at_the_end():
    """The last query sees all; with more queries than keys, the first ones see nothing and get 0."""
    x, go = qkv(35, 18, 5), randn(1, 1, 35, 5, seed=8)
    with tiles(TILES[0]):
        out, maps, dq, dk, dv = run(partial(attention, causal=True, rows=index([3, 34])), x, [go])
        same([out[:, :, -1]], [attention(x[0][:, :, -1:], *x[1:])[:, :, 0]])
        assert not out[:, :, :17].any() and not dq[:, :, :17].any() and not maps[:, :, 0].any()
        same([out[:, :, 17:], dq[:, :, 17:], dk, dv],
             run(partial(attention, causal=True), [x[0][:, :, 17:], *x[1:]], [go[:, :, 17:]]))


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hidden_keys_are_not_read(dtype, junk):
    """Whatever they hold, the bits are those of any other content, and equal to a call without these keys."""
    q, k, v = qkv(20, 37, 5, 2, 1, dtype=dtype)
    hidden, go = hide(2, 37, .4), randn(2, 1, 20, 5, seed=8, dtype=dtype)
    f = partial(attention, padding=hidden, rows=index([0]))
    with tiles(TILES[0]):
        want = run(f, [q, k, v], [go])
        k2, v2 = (x.masked_fill(hidden[:, None, :, None], junk) for x in (k, v))
        got = run(f, [q, k2, v2], [go])
        assert all(a.equal(b) for a, b in zip(want, got, strict=True))
        assert not got[3][hidden[:, None]].any() and not got[4][hidden[:, None]].any()
        if dtype == torch.float64:
            for b in 0, 1:
                x = [q[b:b + 1], k[b:b + 1, :, ~hidden[b]], v[b:b + 1, :, ~hidden[b]]]
                out, dq, dk, dv = run(attention, x, [go[b:b + 1]])
                same([out, dq, dk, dv], [want[0][b:b + 1], want[2][b:b + 1], *(
                    g[b:b + 1, :, ~hidden[b]] for g in want[3:])])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_nothing_to_see(impl):
    """All keys of the first image are hidden: 0, not NaN, and the second image is as if alone."""
    x, hidden = qkv(18, 21, 5, 2, 2), torch.zeros(2, 21, dtype=torch.bool, device=DEVICE)
    hidden[0] = True
    with tiles(TILES[0]):
        got = run(partial(attention, padding=hidden, rows=index([17, 0]), impl=impl), x)
        alone = run(partial(attention, rows=index([17, 0]), impl=impl), [y[1:] for y in x])
    assert not any(y[0].any() for y in got)
    same([y[1:] for y in got], alone)


# ---- extremes

@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("make", [
    lambda k, one, ramp: (k, k),                                  # each query is sure of its twin
    lambda k, one, ramp: (k, -k),                                 # of whatever is most unlike it
    lambda k, one, ramp: (one, one),                              # ties
    lambda k, one, ramp: (one, ramp),                             # each block of keys has a new maximum
    lambda k, one, ramp: (one, -ramp),                            # none after the first
    lambda k, one, ramp: (k, 0 * k),
], ids=["twin", "unlike", "ties", "up", "down", "zero"])
def test_sharp(make, dtype):
    """Logits up to 1e4."""
    k = 100 * F.normalize(randn(1, 1, 37, 16), dim=-1)
    one = k[:, :, :1].expand_as(k)
    q, k = make(k, one, one * torch.linspace(-1, 1, 37)[:, None].to(k))
    v = randn(1, 1, 37, 16, seed=3)
    with tiles(TILES[0]):
        three_way(*(x.to(dtype) for x in (q[:, :, :33], k, v)), scale=1., rows=index([0, 32]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(dtype):
    """Smaller errors than PyTorch's in the mean square. And to the nearest, so that they cancel in the sum:
    cutting bits off would lose half an ulp of it.
    """
    x, go = qkv(70, 67, 64, dtype=dtype), randn(1, 1, 70, 64, seed=8, dtype=dtype)
    exact, plain = (run(attention_reference, y, [go]) for y in ([y.double() for y in x], x))
    with tiles(dict(BM=64, BN=64)):
        ours = run(attention, x, [go])
    for e, p, y in zip(exact, plain, ours, strict=True):
        error = y.double() - e
        assert error.norm() < .9 * (p.double() - e).norm()
        assert (error * e.sign()).sum().abs() < torch.finfo(dtype).eps / 16 * e.abs().sum()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_int32(axis):
    """Four images, heads or rows 1.4 GB apart: 3 * stride > 2^31. The memory between is never touched."""
    far = torch.empty(2**31 + 999, dtype=torch.float16, device=DEVICE)
    shape, strides = [2, 2, 2, 5], [80, 40, 20, 1]
    shape[axis], strides[axis] = 4, 2**31 // 3 + 1
    q, k, v = (far.as_strided(shape, strides, i).copy_(randn(*shape, seed=i)) for i in (0, 5, 10))
    go = far.as_strided(shape, strides, 15).copy_(randn(*shape, seed=15))
    want = run(attention, [x.contiguous() for x in (q, k, v)], [go.contiguous()])
    same(run(attention, [q, k, v], [go]), want, torch.finfo(far.dtype).eps)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_bad_input_shows(which, bad):
    x = qkv(33, 20, 5)
    x[which][0, 0, 10, 3] = bad
    with warnings.catch_warnings(action="ignore"), tiles(TILES[0]):
        out = attention(*x)
    assert not out[0, 0, 10].isfinite().all() and (which > 0 or out[0, 0, :10].isfinite().all())


# ---- the operator

def test_fused_projection_is_not_copied():
    """q, k, v as views of one [B,N,3,H,d], out merged as [B,N,H d]: the strides go to the kernel."""
    x, w, seen, launch = randn(2, 19, 3, 2, 5), randn(10, 4, seed=1), [], module._launch

    def layer(x, impl="auto"):
        out = attention(*x.permute(2, 0, 3, 1, 4), impl=impl)
        return out.transpose(1, 2).reshape(2, 19, 10) @ w

    def spy(kernel, shift, scale, tensors, *rest, **options):
        seen.extend(tensors)
        launch(kernel, shift, scale, tensors, *rest, **options)

    with tiles(TILES[0]), mock.patch.object(module, "_launch", spy):
        with mock.patch.object(torch.Tensor, "contiguous", side_effect=AssertionError("a copy")):
            got = run(layer, [x])
    assert not any(t.is_contiguous() for t in seen) and len(seen) == 11
    same(got, run(partial(layer, impl="reference"), [x]))


def test_gradient_of_any_layout():
    """Of stride 0, as .sum() sends it, in the same bits as dense; of a transposed or a padded tensor."""
    x, go = qkv(19, 33, 8), randn(1, 1, 19, 8, seed=8)
    with tiles(TILES[0]):
        harness.check_zero_stride_grad(attention, *x)
        want = run(attention, x, [go])
        for kind in "transposed", "row-strided", "offset":
            same(run(attention, x, [layout(go, kind)]), want, 1e-14)


def test_reads_stay_inside():
    """NaN lies around every tensor, also around those of the backward pass alone."""
    x, go, padding = qkv(17, 19, 5), randn(1, 1, 17, 5, seed=8), hide(3, 19, .4)
    with tiles(TILES[0]):
        out, norm, _ = module._forward(*x, padding[:1], index([16]), 19, .5)
        want = module._backward(go, *x, padding[:1], out, norm, 19, .5)
        go, *x, out, norm = (layout(y, "offset") for y in (go, *x, out, norm))
        with mock.patch("torch.empty_like", lambda y: layout(torch.zeros_like(y), "offset")):
            got = module._backward(go, *x, padding[:1], out, norm, 19, .5)
    assert all(a.equal(b) for a, b in zip(want, got, strict=True))


def test_padding_of_any_layout():
    x, hidden = qkv(19, 33, 8, 2), hide(1, 33, .4)
    with tiles(TILES[0]):
        want = attention(*x, padding=hidden.repeat(2, 1))
        for padding in hidden.expand(2, 33), hidden.repeat(2, 2)[:, :33], hidden.T.repeat(1, 2).T:
            assert attention(*x, padding=padding).equal(want)


def test_opcheck():
    x, hidden, rows = qkv(5, 6, 3, 2, dtype=torch.float32), hide(2, 6, .4), index([0, 4])
    out, lse, _ = module._forward(*x, hidden, rows, 6, .5)
    torch.library.opcheck(module._backward, (torch.ones_like(out), *x, hidden, out, lse, 6, .5))
    for y in x:
        y.requires_grad_()
    torch.library.opcheck(module._forward, (*x, hidden, rows, 6, .5))
    torch.library.opcheck(module._forward, (*x, None, rows[:0], 1, .5))


def test_compiles_without_a_break():
    x, hidden = qkv(17, 20, 5, 2, dtype=torch.float32), hide(2, 20, .4)
    harness.check_compiles(partial(attention, causal=True, padding=hidden, rows=index([0])), *x)
    harness.check_compiles(attention, *x)


def test_deterministic():
    x = [y.half() for y in qkv(37, 35, 8)]
    with tiles(TILES[0]):
        harness.check_deterministic(partial(attention, rows=index([0, 0, 36])), *x)


def test_backward_inside_autocast():
    harness.check_backward_inside_autocast(attention, (module._forward, module._backward),
                                           *qkv(17, 20, 5, dtype=torch.float32))


def test_double_backward():
    harness.check_no_double_backward(partial(attention, rows=index([0])), *qkv(3, 4, 2))
    x = [y.requires_grad_() for y in qkv(3, 4, 2)]
    assert torch.autograd.gradgradcheck(partial(attention, causal=True, impl="reference"), x)


def test_saves_nothing_of_n_times_m():
    kept = []
    q, k, v = (x.requires_grad_() for x in qkv(17, 19, 3, 1, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attention(q, k, v, padding=hide(1, 19, .4), rows=index([0]))
        assert sorted(kept) == sorted([q.numel(), k.numel(), v.numel(), 19, q.numel(), 2 * 2 * 17])
        kept.clear()
        with torch.no_grad():
            assert attention(q, k, v).grad_fn is None
        assert not kept


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(wanted):
    x, go = qkv(5, 6, 3), randn(1, 1, 5, 3, seed=8)
    want = run(attention, x, [go])[1 + wanted]
    x[wanted].requires_grad_()
    assert torch.autograd.grad(attention(*x), x[wanted], go)[0].equal(want)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, impl):
    """q, k, v are rounded to its type and out has it; gradients keep their own; fp64 is left alone."""
    x = qkv(17, 20, 5, dtype=torch.float32)
    f = partial(attention, rows=index([0]), impl=impl)
    want = run(f, [y.to(low) for y in x])
    with torch.autocast(DEVICE, low):
        got = run(f, x)
        assert [t.dtype for t in got] == [low, *[torch.float32] * 4]
        assert all(a.equal(b.to(a.dtype)) for a, b in zip(got, want, strict=True))
        assert f(*qkv(3, 4, 2))[0].dtype == torch.float64


def shaped(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("shapes", [
    [(5, 3)] * 3, [(1, 5, 3)] * 3, [(1, 2, 5, 3), (1, 2, 4, 3), (1, 2, 5, 3)],
    [(1, 2, 5, 3), *[(1, 3, 5, 3)] * 2], [(2, 1, 5, 3), *[(1, 1, 5, 3)] * 2],
    [(1, 1, 5, 3), *[(1, 1, 5, 4)] * 2], [(0, 1, 5, 3)] * 3, [(1, 1, 0, 3), *[(1, 1, 5, 3)] * 2],
    [(1, 1, 5, 3), *[(1, 1, 0, 3)] * 2], [(1, 1, 5, 0)] * 3, [(1, 1, 5, 129)] * 3])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_wrong_shapes(shapes, impl):
    with pytest.raises(ValueError, match=r"q must be \[B,H,N,d\], k, v \[B,H,M,d\], d <= 128.*got \["):
        attention(*(shaped(*s) for s in shapes), impl=impl)


@pytest.mark.parametrize("options, words", [
    (dict(padding=shaped(2, 5)), r"padding must be bool \[B,M\], got torch.float32 \[2, 5\]"),
    (dict(padding=shaped(1, 4, dtype=torch.bool)), r"padding .*\[1, 4\]"),
    (dict(padding=shaped(5, dtype=torch.bool)), r"padding .*\[5\]"),
    (dict(rows=shaped(2, dtype=torch.int32)), r"rows must be int64 \[R\], got torch.int32 \[2\]"),
    (dict(rows=shaped(1, 2, dtype=torch.int64)), r"rows .*\[1, 2\]"),
    (dict(scale=0.), "scale must be > 0.*got 0.0"), (dict(scale=-1.), "got -1.0"),
    (dict(scale=torch.tensor(.3)), 'unless impl="reference"'), (dict(scale=math.nan), "got nan"),
    (dict(impl="cuda"), "'cuda'"),
])
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        attention(*[shaped(2, 1, 5, 3)] * 3, **options)


def test_wrong_types():
    with pytest.raises(ValueError, match="one dtype, got .* torch.float32, .* torch.float16"):
        attention(shaped(1, 1, 5, 3), *[shaped(1, 1, 5, 3).half()] * 2)


def test_triton_where_it_cannot_run():
    x = [torch.zeros(2, 1, 5, 3, device="meta")] * 3
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        attention(*x, impl="triton")
    out, maps = attention(*x, rows=torch.zeros(4, dtype=torch.int64, device="meta"))
    assert out.shape == (2, 1, 5, 3) and maps.shape == (2, 1, 4, 5)


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, attention
x = [torch.tensor(y)[None, None, :, None].requires_grad_() for y in ([0.], [1., 2.], [1., 3.])]
out, maps = attention.attention(*x, rows=torch.tensor([0]))
out.sum().backward()
print(out.item(), *maps.flatten().tolist(), *x[2].grad.flatten().tolist())
try: attention.attention(*x, impl="triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "attention.py").write_text(Path(module.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    values, message = out.stdout.splitlines()
    assert list(map(float, values.split())) == [2., .5, .5, .5, .5]
    assert "cannot run on cpu" in message and why in message
