"""InfoNCE: the kernel against its definition, against the formula in loops, by symmetries, on processes."""
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
import torch.distributed as dist
import torch.nn.functional as F
from harness import DEVICE, LAYOUTS, LOW, SCALES, compare, layout, randn, run, two_processes
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from kernels import info_nce as module
from kernels.contrastive import nt_xent
from kernels.info_nce import info_nce, info_nce_reference

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
TILES = [dict(BM=16, BN=32, BD=16, BO=64), dict(BM=32, BN=16, BD=64, BO=32), dict(BM=32, BN=64, BD=32, BO=16)]
QUERIES = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 34, 65])      # B
KEYS = st.sampled_from([1, 3, 5, 16, 31, 32, 37, 67, 101])        # M
WIDTHS = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 34, 66])    # D
TAUS = st.sampled_from([.01, .1, .5, 1.])
PROGRAMS = st.sampled_from([256, 1, 4, 7])
SEEDS, LAYOUT = st.integers(0, 2**16), st.sampled_from(LAYOUTS)
KINDS = st.sampled_from(["place", "key"])                         # of target


def tiles(t, programs=256):
    """Run with this tile, whatever the table says, and so many programs at least."""
    def table(D, itemsize, shared, backward):
        return {k: v for k, v in t.items() if backward or k != "BO"} | dict(num_warps=4, num_stages=1)
    return mock.patch.multiple(module, _tiles=table, PROGRAMS=programs)


def unit(n, D, seed=0):
    return F.normalize(randn(n, D, seed=seed))


def places(B, M, seed=0):
    return torch.randint(M, (B,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def targets(B, M, D, kind, seed=0):
    return places(B, M, seed) if kind == "place" else unit(B, D, seed + 2)


def cast(values, dtype):
    return [x.to(dtype) if x.is_floating_point() else x for x in values]


def three_way(q, k, target, tau, go=None):
    """Loss, dq, dk, and dk+ if there is one. Their terms are G_ij k_j / (B tau), with |G| <= 1."""
    own = target.is_floating_point()
    rows = [x.double() for x in ([q, k, target] if own else [q, k])]
    s = max((rows[0] @ x.T).abs().max().item() for x in rows[1:]) / tau
    dq, dk = (max(x.abs().max().item() for x in xs) / (len(q) * tau) for xs in (rows[1:], rows[:1]))
    largest = [max(s, math.log(len(k) + own)), dq, dk, dk]
    compare(partial(info_nce, tau=tau), partial(info_nce_reference, tau=tau), [q, k, target], largest, go)


def paper(q, k, target, tau):
    """-log f(pos) / sum f in loops over numbers; a key of its own is one more term of the sum."""
    q, k, own = q.tolist(), k.tolist(), target.is_floating_point()

    def f(u, v):
        return math.exp(sum(x * y for x, y in zip(u, v, strict=True)) / tau)

    loss = 0.
    for u, t in zip(q, target.tolist(), strict=True):
        pos = f(u, t if own else k[t])
        loss -= math.log(pos / (sum(f(u, v) for v in k) + (pos if own else 0.))) / len(q)
    return loss


# ---- against the definition

@settings(max_examples=20)
@given(QUERIES, KEYS, WIDTHS, TAUS, SEEDS, LAYOUT, LAYOUT, KINDS, st.sampled_from(TILES), PROGRAMS)
def test_float64(B, M, D, tau, seed, kind_q, kind_k, kind, tile, programs):
    target = targets(B, M, D, kind, seed)
    with tiles(tile, programs):
        three_way(layout(unit(B, D, seed), kind_q), layout(unit(M, D, seed + 1), kind_k),
                  layout(target, kind_k) if kind == "key" else target, tau)


@settings(max_examples=26)
@given(QUERIES, KEYS, WIDTHS, TAUS, SEEDS, st.sampled_from(SCALES), LAYOUT, KINDS, st.sampled_from(TILES),
       PROGRAMS, st.sampled_from(LOW))
def test_three_way(B, M, D, tau, seed, length, kind_q, kind, tile, programs, dtype):
    q, k, target = length * unit(B, D, seed), length * unit(M, D, seed + 1), targets(B, M, D, kind, seed)
    q, k, target = cast([q, k, target], dtype)
    with tiles(tile, programs):
        three_way(layout(q, kind_q), k, target, tau * max(1, length)**2)          # beyond, logits are noise


@pytest.mark.parametrize("kind", ["place", "key"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_tiles_of_the_table(dtype, kind):
    for B, M, D in [(34, 70, 130), *[(300, 1000, 260)] * (DEVICE == "cuda")]:
        three_way(*cast([unit(B, D), unit(M, D, 1), targets(B, M, D, kind)], dtype), .1)


@pytest.mark.parametrize("kind", ["place", "key"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_operators_without_kernel(dtype, kind):
    off = partial(module._forward.set_kernel_enabled, DEVICE, enabled=False)
    q, k, target = cast([unit(34, 17), unit(21, 17, 1), targets(34, 21, 17, kind)], dtype)
    with off(), module._backward.set_kernel_enabled(DEVICE, enabled=False):
        with mock.patch.object(module, "_plan", side_effect=AssertionError("the kernel ran")):
            three_way(layout(q, "transposed"), k, target, .1)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("kind", ["place", "key"])
@pytest.mark.parametrize("B, M, D, tau", [(1, 2, 3, .5), (6, 3, 1, .1), (5, 7, 4, .3)])
def test_paper_formula(B, M, D, tau, kind, impl):
    values = [unit(B, D, B), unit(M, D, M + 1), targets(B, M, D, kind)]
    loss, *grads = run(partial(info_nce, tau=tau, impl=impl), values)
    assert loss.item() == pytest.approx(paper(*values, tau), rel=1e-12, abs=1e-14)
    h = 1e-5
    for j, i in [(0, 0), (0, -1), (1, 0), (1, -1), (2, -1)][:4 + (kind == "key")]:
        ends = []                                                     # central differences, without autograd
        for step in h, -h:
            moved = [v.clone() for v in values]
            moved[j].view(-1)[i] += step
            ends.append(paper(*moved, tau))
        assert grads[j].view(-1)[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-8)


# ---- values known by hand

def test_one_key():
    """M=1: nothing to choose from, so loss and gradients are 0, not nearly 0."""
    for dtype in [*LOW, torch.float64]:
        values = [unit(7, 5).to(dtype), unit(1, 5, 1).to(dtype), places(7, 1)]
        assert not any(x.any() for x in run(partial(info_nce, tau=.1), values))


@pytest.mark.parametrize("M", [2, 5, 37])
def test_keys_on_orthogonal_axes(M):
    """log(1 + (M-1) e^(-1/tau)), and G = P - I. A key of its own that is there already is counted twice."""
    tau, eye = .3, torch.eye(M, dtype=torch.float64, device=DEVICE)
    loss, dq, dk = run(partial(info_nce, tau=tau), [eye, eye.clone(), torch.arange(M, device=DEVICE)])
    rest = (M - 1) * math.exp(-1 / tau)
    assert loss.item() == pytest.approx(math.log(1 + rest), rel=1e-14)
    g = ((eye / tau).exp() / (math.exp(1 / tau) + M - 1) - eye) / (M * tau)
    torch.testing.assert_close(dq, g, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dk, g, rtol=1e-12, atol=1e-15)
    assert info_nce(eye, eye, eye, tau).item() == pytest.approx(math.log(2 + rest), rel=1e-14)


def test_equal_keys():
    """All keys equal: log M, with one more log(M+1), whatever the queries are."""
    q, k = unit(19, 5), unit(1, 5, 1).expand(37, 5)
    assert info_nce(q, k, places(19, 37), .1).item() == pytest.approx(math.log(37), rel=1e-13)
    assert info_nce(q, k, k[:19], .1).item() == pytest.approx(math.log(38), rel=1e-13)


def test_places_out_of_range():
    """Such a key has P = 0: the loss is inf, and the gradients are those of the other keys."""
    q, k, tau = unit(5, 4), unit(33, 4, 1), .3
    for bad in -1, 33, 2**31, 2**32, -2**40:
        target = torch.tensor([0, 7, bad, 32, 7], device=DEVICE)
        with tiles(TILES[0], 2):
            loss, dq, dk = run(partial(info_nce, tau=tau), [q, k, target])
        assert loss == math.inf
        g = (q @ k.T / tau).softmax(1)                                # [B,M]  P
        for i in 0, 1, 3, 4:
            g[i, target[i]] -= 1
        torch.testing.assert_close(dq, g @ k / (5 * tau), rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(dk, g.T @ q / (5 * tau), rtol=1e-11, atol=1e-14)
    with pytest.raises(IndexError):
        info_nce(q.cpu(), k.cpu(), target.cpu(), tau, "reference")


def test_nt_xent_is_one_of_these():
    """2N rows, of which each has the others as keys; the gradients of both roles add up."""
    N, tau = 5, .2
    z = unit(2 * N, 5)
    loss, dz = run(partial(nt_xent, tau=tau), [z])
    losses, grad = [], torch.zeros_like(z)
    for i in range(2 * N):
        others = [j for j in range(2 * N) if j != i]
        at = torch.tensor([others.index((i + N) % (2 * N))], device=DEVICE)
        one, dq, dk = run(partial(info_nce, tau=tau), [z[i:i + 1], z[others], at])
        losses.append(one)
        grad[i] += dq[0] / (2 * N)
        grad[others] += dk / (2 * N)
    torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, dz, rtol=1e-10, atol=1e-14)


# ---- symmetries

@settings(max_examples=8)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 17, 33]), KINDS, SEEDS)
def test_symmetries(B, M, D, kind, seed):
    values = q, k, target = unit(B, D, seed), unit(M, D, seed + 1), targets(B, M, D, kind, seed)
    own, close = kind == "key", partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
    loss, dq, dk, *dt = run(partial(info_nce, tau=.2), values)

    def check(q, k, target, *want, tau=.2):
        for found, x in zip(run(partial(info_nce, tau=tau), [q, k, target]), want, strict=True):
            close(found, x)

    generator = torch.Generator().manual_seed(seed)
    rows, order = torch.randperm(B, generator=generator), torch.randperm(M, generator=generator)
    turn, shift = torch.linalg.qr(randn(D, D, seed=seed))[0], randn(D, seed=seed)
    check(q[rows], k, target[rows], loss, dq[rows], dk, *(x[rows] for x in dt))
    check(q, k[order], target if own else order.argsort().to(DEVICE)[target], loss, dq, dk[order], *dt)
    turned = loss, dq @ turn, dk @ turn, *(x @ turn for x in dt)
    check(q @ turn, k @ turn, target @ turn if own else target, *turned)
    check(2 * q, 3 * k, 3 * target if own else target, loss, dq / 2, dk / 3, *(x / 3 for x in dt), tau=1.2)
    check(q, k + shift, target + shift if own else target, loss, dq, dk, *dt)     # logits of a row: the same
    close(dk.sum(0) + sum(x.sum(0) for x in dt), torch.zeros_like(dk[0]))         # rows of G add up to 0
    close((q * dq).sum(), (k * dk).sum() + sum((target * x).sum() for x in dt))   # q or keys longer: the same


def test_mean_over_rows():
    """A batch in two halves: the loss is their mean, dk half the sum of theirs."""
    q, k, target = unit(34, 5), unit(21, 5, 1), places(34, 21)
    loss, dq, dk = run(partial(info_nce, tau=.1), [q, k, target])
    halves = [run(partial(info_nce, tau=.1), [q[i:i + 17], k, target[i:i + 17]]) for i in (0, 17)]
    mean = [sum(x) / 2 for x in zip(*halves, strict=True)]
    torch.testing.assert_close(loss, mean[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(dk, mean[2], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(dq[17:], halves[1][1] / 2, rtol=1e-11, atol=1e-14)


# ---- extremes

@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("make", [
    lambda: (unit(1, 33).expand(34, 33), unit(1, 33).expand(70, 33), places(34, 70)),
    lambda: (unit(40, 64), unit(40, 64), torch.arange(40, device=DEVICE)),        # P of the positive is 1
    lambda: (unit(40, 64), -unit(40, 64), torch.arange(40, device=DEVICE)),       # it is the worst of all
    lambda: (unit(40, 64), unit(33, 64, 1), unit(40, 64)),            # MoCo, sure of k+
    lambda: (unit(40, 64), unit(33, 64, 1), -unit(40, 64)),           # MoCo, all wrong
    lambda: (0 * unit(34, 5), unit(33, 5), places(34, 33)),
], ids=["equal", "aligned", "opposite", "key", "far key", "zero"])
def test_sharp(make, dtype):
    three_way(*(x.to(dtype) if x.is_floating_point() else x for x in make()), .01)


@pytest.mark.parametrize("kind", ["place", "key"])
@pytest.mark.parametrize("dtype, tau, rtol", [(torch.float16, .06, 1e-3), (torch.float16, .1, 1e-3),
                                              (torch.bfloat16, .1, 8e-3)])
def test_confident(kind, dtype, tau, rtol):
    """Orthogonal keys, each row sure of its own: P - 1, -3e-3 at tau = .1, is precise, though P in this type
    is not; so are the other P, 6e-8 at tau = .06, a step of fp16."""
    n, go = 32, 2.**16
    k = torch.eye(2 * n, dtype=dtype, device=DEVICE)
    q, k, target = (k[:n], k[n:], k[:n]) if kind == "key" else (k[:n], k, torch.arange(n, device=DEVICE))
    dq = run(partial(info_nce, tau=tau), [q, k, target], go)[1].double()
    others = n if kind == "key" else 2 * n - 1
    p = go / (n * tau) / (math.exp(1 / tau) + others)
    torch.testing.assert_close(dq[:, n:], torch.full_like(dq[:, n:], p), rtol=rtol, atol=0)
    if tau == .1:
        torch.testing.assert_close(dq.diagonal(), torch.full_like(dq[0, :n], -others * p), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_no_bias(dtype):
    """To the nearest, so errors cancel in the sum; cutting bits off would lose half an ulp of it."""
    values = [unit(70, 64).to(dtype), unit(60, 64, 1).to(dtype), places(70, 60)]
    exact = run(partial(info_nce_reference, tau=.1), cast(values, torch.float64))
    for found, e in zip(run(partial(info_nce, tau=.1), values)[1:], exact[1:], strict=True):
        assert ((found.double() - e) * e.sign()).sum().abs() < torch.finfo(dtype).eps / 20 * e.abs().sum()


@pytest.mark.parametrize("which", [0, 1])
def test_offsets_beyond_int32(which):
    """Four rows 1.4 GB apart: 3 * stride > 2^31. The memory between is never touched."""
    values = [unit(4, 5).half(), unit(4, 5, 1).half()]
    far = torch.empty(2**31 + 9, dtype=torch.float16, device=DEVICE)
    values[which] = far.as_strided((4, 5), (2**31 // 3 + 1, 1)).copy_(values[which])
    three_way(*values, places(4, 4), .1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_bad_input_shows(bad, which):
    values = [unit(34, 5), unit(33, 5, 1), unit(34, 5, 2)]
    values[which][20, 3] = bad
    with warnings.catch_warnings(action="ignore"):
        assert not info_nce(*values, .1).isfinite()


def test_gradient_scales_with_the_incoming_one():
    for go in [0., -2., 1024.]:
        three_way(unit(34, 17).half(), unit(21, 17, 1).half(), unit(34, 17, 2).half(), .1, go=go)


# ---- the operator

def test_opcheck():
    q, k = unit(6, 5).float(), unit(9, 5, 1).float()
    for target in places(6, 9).int(), randn(6).float():
        _, lse = module._forward(q, k, target, .1)
        torch.library.opcheck(module._backward, (q, k, target, lse, .1, False))
        torch.library.opcheck(module._backward, (k, q, target, lse, .1, True))
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in (q, k, target)]
        torch.library.opcheck(module._forward, (*leaves, .1))


@pytest.mark.parametrize("kind", ["place", "key"])
def test_compiles_without_a_break(kind):
    def loss(q, k, target):
        return info_nce(F.normalize(q), F.normalize(k), target, .1)
    target = targets(34, 21, 17, kind)
    harness.check_compiles(loss, unit(34, 17).float(), unit(21, 17, 1).float(),
                           target.float() if kind == "key" else target)


def test_deterministic():
    with tiles(TILES[2], 7):
        harness.check_deterministic(partial(info_nce, tau=.1), unit(34, 33).half(), unit(70, 33, 1).half(),
                                    places(34, 70))


def test_backward_inside_autocast():
    q, k, operators = unit(34, 17).float(), unit(70, 17, 1).float(), (module._forward, module._backward)
    for target in places(34, 70), unit(34, 17, 2).float():
        harness.check_backward_inside_autocast(partial(info_nce, tau=.05), operators, q, k, target)


def test_double_backward():
    for target in places(6, 9), unit(6, 5, 2):
        values = [unit(6, 5), unit(9, 5, 1), target]
        harness.check_no_double_backward(partial(info_nce, tau=.1), *values)
        if target.is_floating_point():
            q, k = values[:2]
            harness.check_no_double_backward(lambda t, q=q, k=k: info_nce(q, k, t, .1), target)
        values = [x.requires_grad_(x.is_floating_point()) for x in values]
        assert torch.autograd.gradgradcheck(partial(info_nce, tau=.5, impl="reference"), values)


def test_saves_only_what_it_was_given_and_lse():
    kept = []
    q, k, target = unit(70, 5).requires_grad_(), unit(40, 5, 1), places(70, 40)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        info_nce(q, k, target, .1)
        assert sorted(kept) == sorted([70 * 5, 40 * 5, 70, 2 * 70])
        kept.clear()
        with torch.no_grad():
            assert info_nce(q, k, target, .1).grad_fn is None
        assert not kept


def test_memory_is_that_of_q_and_k():
    """Nothing as large as S: partial sums of all programs at once are as many tiles as there are programs."""
    sizes, empty = [], torch.empty

    def record(*shape, **options):
        sizes.append(math.prod(empty(*shape, device="meta").shape))
        return empty(*shape, **options)

    with tiles(dict(BM=16, BN=16, BD=16, BO=16), 7), mock.patch("torch.empty", record):
        three_way(unit(40, 8), unit(150, 8, 1), places(40, 150), .1)
    assert max(sizes) == 150 * 8 and len(sizes) == 3


@pytest.mark.parametrize("kind", ["place", "key"])
def test_keys_without_gradient_cost_nothing(kind):
    """MoCo: neither the queue nor k+ has one. One launch, and none for dk."""
    q, k, target = unit(34, 17).requires_grad_(), unit(21, 17, 1), targets(34, 21, 17, kind)
    with mock.patch.object(module, "_backward", side_effect=module._backward) as op:
        info_nce(q, k, target, .1).backward()
        assert op.call_count == 1
    want = run(lambda q: info_nce_reference(q, k, target, .1), [q])[1]
    torch.testing.assert_close(q.grad, want, rtol=1e-12, atol=1e-15)
    assert k.grad is None


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, impl):
    """The rows are rounded to the type of autocast, loss and gradients keep theirs; fp64 is left alone."""
    values = [unit(34, 17), unit(21, 17, 1), unit(34, 17, 2)]
    f = partial(info_nce, tau=.1, impl=impl)
    want = run(f, [v.float().to(low) for v in values])
    with torch.autocast(DEVICE, low):
        got = run(f, [v.float() for v in values])
        assert [t.dtype for t in got] == [torch.float32] * 4
        assert all(x.equal(y.float()) for x, y in zip(got, want, strict=True))
        assert f(values[0].float(), values[1].to(low), values[2].float()).equal(got[0])
        assert f(*values).dtype == torch.float64 and f(*values[:2], places(34, 21)).dtype == torch.float64


@pytest.mark.parametrize("q, k, target, tau, impl, words", [
    ((5, 3), (4, 2), (5,), .1, "auto", r"\[5, 3\] torch.float32, \[4, 2\]"),
    ((5, 3), (4, 3), (4,), .1, "auto", r"\[4\]$"), ((5, 3), (4, 3), (5, 1), .1, "auto", r"\[5, 1\]$"),
    ((3,), (4, 3), (5,), .1, "auto", r"got \[3\]"), ((5, 3), (3,), (5,), .1, "auto", "M,D"),
    ((5, 3), (2, 4, 3), (5,), .1, "auto", "M,D"), ((0, 3), (4, 3), (0,), .1, "auto", "B, M, D >= 1"),
    ((5, 3), (0, 3), (5,), .1, "auto", "B, M, D >= 1"), ((5, 0), (4, 0), (5,), .1, "reference", "M, D >= 1"),
    ((5, 3), (4, 3), (5,), 0., "auto", "positive"), ((5, 3), (4, 3), (5,), -1., "reference", "positive"),
    ((5, 3), (4, 3), (5,), math.nan, "auto", "positive"), ((5, 3), (4, 3), (5,), .1, "cuda", "'cuda'"),
])
def test_errors(q, k, target, tau, impl, words):
    target = torch.zeros(target, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=words):
        info_nce(torch.zeros(q, device=DEVICE), torch.zeros(k, device=DEVICE), target, tau, impl)


def test_more_errors():
    q = unit(4, 3).float()
    with pytest.raises(ValueError, match="one dtype, .* torch.float32, .* torch.float16"):
        info_nce(q, q.half(), places(4, 4), .1)
    for k, target in (q.to("meta"), places(4, 4)), (q, places(4, 4).to("meta")):
        with pytest.raises(ValueError, match="one device"):
            info_nce(q, k, target, .1)
    with pytest.raises(ValueError, match=r"\[4\]$"):
        info_nce(q, q, torch.zeros(4, device=DEVICE), .1)             # floating: it should be [B,D]


def test_a_temperature_that_learns_needs_the_definition():
    """The kernel would leave it without a gradient."""
    q, tau = unit(4, 3), torch.tensor(.5, device=DEVICE, requires_grad=True)
    for impl in "auto", "triton":
        with pytest.raises(ValueError, match="reference"):
            info_nce(q, q, places(4, 4), tau, impl)
    impl = "reference"
    info_nce(q, q, places(4, 4), tau, impl).backward()
    assert tau.grad.abs() > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_places_of_any_integer_type(dtype):
    q, k, target = unit(4, 3), unit(300, 3, 1), torch.tensor([0, 99, 127, 5], device=DEVICE)
    assert info_nce(q, k, target.to(dtype), .1).equal(info_nce(q, k, target, .1))


def test_no_place_is_ignored_by_the_reference():
    """-100 is what F.cross_entropy leaves out unless told otherwise."""
    q, k, target = unit(3, 4).cpu(), unit(5, 4, 1).cpu(), torch.tensor([-100, 0, 1])
    with pytest.raises(IndexError, match="out of bounds"):
        info_nce(q, k, target, .5, "reference")


def test_a_positive_of_another_type_leaves_the_loss_its_own():
    q, target = unit(4, 3).float(), unit(4, 3, 1)
    assert {info_nce(q, q, target, .1, impl).dtype for impl in ("auto", "reference")} == {torch.float32}


def test_triton_where_it_cannot_run():
    q, target = torch.zeros(4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        info_nce(q, q, target, .1, "triton")
    assert info_nce(q, q, target, .1).shape == ()


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, info_nce
q, target = torch.eye(2).requires_grad_(), torch.arange(2)
print(info_nce.info_nce(q, q, target, .5).item())
info_nce.info_nce(q, q, q, .5).backward()
try: info_nce.info_nce(q, q, target, .5, "triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "info_nce.py").write_text(Path(module.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    loss, message = out.stdout.splitlines()
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    assert "cannot run on cpu" in message and why in message


# ---- two processes, each with its rows against the keys of both

def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    rows = slice(7 * rank, 7 * rank + 7)
    q, k = (unit(14, 5, seed)[rows].requires_grad_() for seed in range(2))
    loss = info_nce(q, common.gather(k), 7 * rank + torch.arange(7), .2)
    loss.backward()
    torch.save(dict(loss=loss.detach(), q=q.grad, k=k.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo gathers on the CPU")
def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Each has a part of the loss of all, so DDP's mean over them is the gradient of the whole."""
    both = two_processes(worker, tmp_path)
    loss, dq, dk = run(partial(info_nce_reference, tau=.2), [unit(14, 5), unit(14, 5, 1), torch.arange(14)])
    torch.testing.assert_close(sum(f["loss"] for f in both) / 2, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([f["q"] for f in both]) / 2, dq, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(torch.cat([f["k"] for f in both]) / 2, dk, rtol=1e-11, atol=1e-14)
