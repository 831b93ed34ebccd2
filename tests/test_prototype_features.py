"""Logits-free DINO loss: the kernel against its definition, against attention, and against prototype_ce."""
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
from harness import DEVICE, LAYOUTS, LOW, SCALES, compare, layout, randn, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import prototype_features as module
from kernels.prototype_ce import prototype_ce
from kernels.prototype_features import prototype_ce_features

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
TILES = [(4, dict(BM=16, BN=32, BD=64, BO=32)), (8, dict(BM=32, BN=16, BD=16, BO=16)),
         (1, dict(BM=16, BN=16, BD=32, BO=64))]                   # programs, which decide the splits; blocks
ROWS = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 35])             # R
PROTOTYPES = st.sampled_from([1, 3, 15, 16, 17, 31, 33, 37])      # K
WIDTHS = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 33])            # D
SEEDS = st.integers(0, 2**16)
TAU = dict(tau_s=.1, tau_t=.04)
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)


def tiles(t):
    """Run with these tiles, whatever the table says."""
    programs, tile = t

    def table(D, itemsize, shared, backward):
        return {k: v for k, v in tile.items() if backward or k != "BO"} | dict(num_warps=4, num_stages=1)
    return mock.patch.multiple(module, _tiles=table, _plan=partial(module._plan, programs=programs))


def problem(R, K, D, seed=0, dtype=torch.float64, center=True):
    """x_s, w_s; and the teacher, as it is called."""
    x_s, w_s, x_t, w_t = (F.normalize(randn(n, D, seed=seed + i)).to(dtype) for i, n in enumerate([R, K] * 2))
    c = .3 * randn(K, seed=seed + 4).to(dtype)
    return (x_s, w_s), dict(x_t=x_t, w_t=w_t, center=c if center else None)


def ce(x_t, w_t, center=None, tau_s=.1, tau_t=.04, impl="auto"):
    """The loss as a function of x_s and w_s, with the teacher in the type of x_s."""
    def f(x_s, w_s):
        c = center if center is None else center.to(x_s.dtype)
        return prototype_ce_features(x_s, w_s, x_t.to(x_s.dtype), w_t.to(x_s.dtype), tau_s, tau_t, c, impl)
    return f


def three_way(student, teacher, seed=3, go=None):
    R, tau = len(student[0]), teacher.get("tau_s", .1)
    go = randn(R, seed=seed) if go is None else go
    x, w = (x.double().abs().max().item() for x in student)
    g = go.abs().max().item() / tau                               # terms: logits, G w and G x
    largest = student[0].shape[1] * x * w / tau, g * w, g * x
    compare(ce(**teacher), ce(**teacher, impl="reference"), list(student), largest, [go])


# ---- against the definition

@settings(max_examples=20)
@given(ROWS, PROTOTYPES, WIDTHS, SEEDS, st.booleans(), st.sampled_from([(.1, .04), (1., .07), (.05, .5)]),
       st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4), st.sampled_from(TILES))
def test_float64(R, K, D, seed, center, taus, kinds, tile):
    student, teacher = problem(R, K, D, seed, center=center)
    x_s, w_s, x_t, w_t = map(layout, (*student, teacher["x_t"], teacher["w_t"]), kinds)
    with tiles(tile):
        three_way((x_s, w_s), teacher | dict(x_t=x_t, w_t=w_t, tau_s=taus[0], tau_t=taus[1]), seed)


@settings(max_examples=30)
@given(ROWS, PROTOTYPES, WIDTHS, SEEDS, st.booleans(), st.sampled_from(SCALES), st.sampled_from(LAYOUTS),
       st.sampled_from(TILES), st.sampled_from(LOW))
def test_three_way(R, K, D, seed, center, scale, kind, tile, dtype):
    """Temperatures rise with larger features: beyond, logits are noise in fp32."""
    student, teacher = problem(R, K, D, seed, dtype, center)
    student = [layout((scale * x).to(dtype), kind) for x in student]
    with tiles(tile):
        three_way(student, teacher | dict(tau_s=.1 * max(1, scale**2), tau_t=.07), seed)


@pytest.mark.parametrize("R, K, D", [(70, 150, 130)] + [(300, 5000, 260)] * (DEVICE == "cuda"))
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_tiles_of_the_table(R, K, D, dtype):
    three_way(*problem(R, K, D, dtype=dtype))


def test_one_split_of_D_both_ways():
    """Or the backward pass has other last bits in s than lse has, which / tau makes 3 times the error."""
    for D in 16, 128, 256, 384:
        for itemsize in 2, 4, 8:
            for shared in 0, 65_536, 166_912, 232_448:
                forward, backward = (module._tiles(D, itemsize, shared, b) for b in (False, True))
                assert forward["BD"] == backward["BD"] and "BO" not in forward


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_operators_without_kernel(dtype):
    """Nor does autocast reach into them."""
    student, teacher = problem(9, 17, 5, dtype=dtype)
    student = [layout(x, "transposed") for x in student]
    off = partial(module._forward.set_kernel_enabled, DEVICE, enabled=False)
    with off(), module._backward.set_kernel_enabled(DEVICE, enabled=False):
        with mock.patch.object(module, "_plan", side_effect=AssertionError("the kernel ran")):
            three_way(student, teacher)
            loss = ce(**teacher)(*student)
            with torch.autocast(DEVICE, torch.bfloat16):
                same = ce(**teacher)(*student)
                assert same.equal(loss) or dtype in (torch.float16, torch.float32)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("R, K, D", [(1, 2, 3), (3, 5, 2), (2, 18, 4)])
def test_paper_formula(R, K, D, impl):
    """The formula in loops over numbers; the gradient by central differences, without autograd."""
    student, teacher = problem(R, K, D, seed=K)

    def dot(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True))

    def P(logits, tau):
        total = sum(math.exp(v / tau) for v in logits)
        return [math.exp(v / tau) / total for v in logits]

    def paper(x_s, w_s):
        (x_s, w_s, x_t, w_t, c), losses = (x.tolist() for x in (x_s, w_s, *teacher.values())), []
        for i in range(R):
            p_t = P([dot(x_t[i], w) - b for w, b in zip(w_t, c, strict=True)], .04)
            p_s = P([dot(x_s[i], w) for w in w_s], .1)
            losses.append(-sum(a * math.log(b) for a, b in zip(p_t, p_s, strict=True)))
        return losses

    loss, *grads = run(ce(**teacher, impl=impl), student)
    assert loss.tolist() == pytest.approx(paper(*student), rel=1e-12)
    h = 1e-5
    for n, (x, grad) in enumerate(zip(student, grads, strict=True)):
        for at in (0, 0), (len(x) - 1, D - 1), (len(x) // 2, 1):
            ends = []
            for sign in 1, -1:
                moved = [y.clone() for y in student]
                moved[n][at] += sign * h
                ends.append(sum(paper(*moved)))
            assert grad[at].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-7)


@settings(max_examples=4)
@given(ROWS, PROTOTYPES, WIDTHS, SEEDS)
def test_it_is_an_attention(R, K, D, seed):
    """Of queries x_t, keys w_t, values w_s, bias -c / tau_t: loss = LSE(s / tau_s) - x_s . out / tau_s."""
    student, teacher = problem(R, K, D, seed)

    def attention(x_s, w_s):
        bias = (-teacher["center"] / .04).expand(R, K)
        out = F.scaled_dot_product_attention(teacher["x_t"], teacher["w_t"], w_s, bias, scale=1 / .04)
        return (x_s @ w_s.T / .1).logsumexp(1) - (x_s * out).sum(1) / .1

    with tiles(TILES[0]):
        close(run(ce(**teacher), student), run(attention, student))


@settings(max_examples=4)
@given(ROWS, PROTOTYPES, WIDTHS, SEEDS)
def test_equals_prototype_ce_on_its_logits(R, K, D, seed):
    student, teacher = problem(R, K, D, seed)
    t, go = teacher["x_t"] @ teacher["w_t"].T, [randn(R, seed=seed)]
    with tiles(TILES[1]):
        close(run(ce(**teacher), student, go),
              run(lambda x, w: prototype_ce(x @ w.T, t, .1, .04, teacher["center"]), student, go))


# ---- values known by hand

@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_no_features(dtype):
    """x_s = 0 is a uniform student: ln K, and w_s gets no gradient. K = 1: all is 0, not nearly 0."""
    for K in 33, 1:
        (x, w), teacher = problem(5, K, 7, dtype=dtype)
        loss, dx, dw = run(ce(**teacher), [x * (K == 1), w])
        assert loss.tolist() == pytest.approx([math.log(K)] * 5, rel=1e-6, abs=0)
        assert not dw.any() and dx.any() == (K > 1)


def test_prototypes_on_the_axes():
    """x_s = x_t = e_1, W = I: p(1) = e^(1/tau) / (e^(1/tau) + K - 1) for both, the rest uniform."""
    K, tau_s, tau_t = 37, .5, .25
    w = torch.eye(K, dtype=torch.float64, device=DEVICE)
    x = w[:1].clone()
    loss, dx, _ = run(ce(x, w, None, tau_s, tau_t), [x, w])
    p_s, p_t = (math.exp(1 / tau) / (math.exp(1 / tau) + K - 1) for tau in (tau_s, tau_t))
    assert loss.item() == pytest.approx(math.log(math.exp(1 / tau_s) + K - 1) - p_t / tau_s, rel=1e-13)
    want = torch.full((1, K), (p_t - p_s) / (K - 1) / tau_s, dtype=torch.float64, device=DEVICE)
    want[0, 0] = (p_s - p_t) / tau_s
    close(dx, want)


@pytest.mark.parametrize("dtype", LOW)
def test_sure_teacher_and_student(dtype):
    """Logits of 1e4 or 0: the loss is 0 where both choose the same prototype, 1e4 / tau_s where not."""
    w = 100 * torch.eye(33, dtype=dtype, device=DEVICE)
    label = torch.tensor([0, 32, 7, 7, 15], device=DEVICE)
    with tiles(TILES[0]):
        for wrong in 0, 1:
            loss, dx, dw = run(ce(w[label], w, None, 1., .04), [w[(label + wrong) % 33], w])
            assert loss.tolist() == [1e4 * wrong] * 5
            want = (w[(label + wrong) % 33] - w[label]).double()
            close(dx.double(), want)
            assert dw.any() == wrong


# ---- symmetries

@settings(max_examples=4)
@given(ROWS, PROTOTYPES, WIDTHS, SEEDS, st.sampled_from(TILES))
def test_symmetries(R, K, D, seed, tile):
    (x, w), teacher = problem(R, K, D, seed)
    x_t, w_t, c = teacher.values()
    go = [randn(R, seed=seed + 5)]
    turn, turn_t = (torch.linalg.qr(randn(D, D, seed=seed + i))[0] for i in (6, 7))
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    with tiles(tile):
        loss, dx, dw = run(ce(x_t, w_t, c), [x, w], go)

        other = run(ce(x_t @ turn_t, w_t @ turn_t, c), [x @ turn, w @ turn], go)       # each has its own axes
        close(other, [loss, dx @ turn, dw @ turn])
        other = run(ce(x_t, w_t[order], c[order]), [x, w[order]], go)                  # prototypes: no order
        close(other, [loss, dx, dw[order]])
        other = run(ce(2 * x_t, w_t, 2 * c + 3, .3, .08), [3 * x, w], go)              # temperature, centre
        close(other, [loss, dx / 3, dw])
        other = run(ce(x_t, w_t, c), [x, w + randn(1, D, seed=seed)], go)              # s, shifted by row
        close([other[0], other[2]], [loss, dw])
        other = run(ce(x_t[-1:], w_t, c), [x[-1:], w], [go[0][-1:]])                   # rows are independent
        close(other[:2], [loss[-1:], dx[-1:]])
    close((x * dx).sum(), (w * dw).sum(), rtol=1e-10, atol=1e-10)     # s is linear in either
    assert dw.sum(0).abs().max() < 1e-12 * (1 + R)                    # that shift, infinitesimally


@settings(max_examples=4)
@given(ROWS, PROTOTYPES, WIDTHS, SEEDS)
def test_a_student_that_equals_its_teacher(R, K, D, seed):
    """The loss is the teacher's entropy, and no gradient is left."""
    (x, w), _ = problem(R, K, D, seed)
    p = F.softmax(x @ w.T / .1, 1)
    with tiles(TILES[0]):
        loss, dx, dw = run(ce(x, w, None, .1, .1), [x, w])
    close(loss, -(p * p.log()).sum(1))
    assert max(dx.abs().max(), dw.abs().max()) < 1e-12


# ---- extremes

@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("make", [
    lambda x: x[:1].expand_as(x),                                     # all rows equal
    lambda x: torch.cat([x[:17], -x[:18]]),
    lambda x: 0 * x,
    lambda x: 8 * x.abs(),
], ids=["equal", "opposite", "zero", "long"])
def test_sharp(make, dtype):
    (x, w), teacher = problem(35, 40, 33, dtype=dtype)
    with tiles(TILES[2]):
        three_way((make(x), w), teacher | dict(x_t=make(teacher["x_t"]), tau_s=.05, tau_t=.01))


def test_tiny_probabilities_in_fp16():
    """Prototypes on the axes, a sure teacher, a student nearly so: p is a step of fp16, dx precise."""
    K, tau, go = 64, .06, 2.**16
    w = torch.eye(K, dtype=torch.float16, device=DEVICE)
    dx = run(ce(w[:20], w, None, tau, .01), [w[:20], w], go)[1].double()
    off = dx[w[:20] == 0]
    p = 1 / (math.exp(1 / tau) + K - 1) - 1 / (math.exp(100) + K - 1)
    close(off, torch.full_like(off, p * go / tau), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_incoming_gradients_of_any_size(dtype):
    """Those times 2^k give these times 2^k: G stays within the range of fp16 on the way."""
    student, teacher = problem(33, 37, 16, dtype=dtype)
    go = randn(33).float()
    with tiles(TILES[0]):
        loss, dx, dw = run(ce(**teacher), student, [go])
        for k in 2.**-6, -2.**9:
            for got, want in zip(run(ce(**teacher), student, [k * go]), (loss, k * dx, k * dw), strict=True):
                close(got, want, rtol=0, atol=max(1, abs(k)) * 2**-24)    # a step of fp16's subnormal numbers
        assert not any(g.any() for g in run(ce(**teacher), student, [0 * go])[1:])


def test_masked_rows():
    """go = 0: exactly no gradient of x, and for w as if the rows were not there."""
    (x, w), teacher = problem(35, 37, 17)
    go, keep = randn(35, seed=7), torch.arange(35, device=DEVICE) % 3 != 0
    with tiles(TILES[1]):
        _, dx, dw = run(ce(**teacher), [x, w], [go * keep])
        want = run(ce(**teacher | dict(x_t=teacher["x_t"][keep])), [x[keep], w], [go[keep]])
    assert not dx[~keep].any() and dx[keep].any(1).all()
    close([dx[keep], dw], want[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_no_bias(dtype):
    """To the nearest, so errors cancel in the sum; cutting bits off would lose half an ulp of it."""
    student, teacher = problem(60, 70, 64, dtype=dtype)
    exact = run(ce(**teacher, impl="reference"), [x.double() for x in student])
    for e, g in zip(exact[1:], run(ce(**teacher), student)[1:], strict=True):
        assert ((g.double() - e) * e.sign()).sum().abs() < torch.finfo(dtype).eps / 20 * e.abs().sum()


def test_no_rows():
    for impl in "auto", "reference":
        student, teacher = problem(0, 5, 3, dtype=torch.bfloat16)
        loss, dx, dw = run(ce(**teacher, impl=impl), student)
        assert (loss.shape, loss.dtype, dx.shape, dw.dtype) == ((0,), torch.float32, (0, 3), torch.bfloat16)
        assert not dw.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", range(4))
def test_bad_input_shows(bad, where):
    student, teacher = problem(9, 37, 5)
    tensors = [*student, teacher["x_t"], teacher["w_t"]]
    tensors[where][3, 2] = bad
    with warnings.catch_warnings(action="ignore"), tiles(TILES[0]):
        loss = prototype_ce_features(*tensors, .1, .04)
    assert not (loss[3] if where % 2 == 0 else loss).isfinite().all()


# ---- the operator

def test_opcheck():
    student, teacher = problem(5, 7, 3, dtype=torch.float32)
    for args in ((*student, *teacher.values(), .1, .04), (*student, *student, None, .1, .04)):
        _, lse = module._forward(*args)
        leaves = [x.clone().requires_grad_() for x in student]
        torch.library.opcheck(module._forward, (*leaves, *args[2:]))
        for of_w in False, True:
            go = torch.ones(5, device=DEVICE)
            torch.library.opcheck(module._backward, (go, *args[:5], lse, *args[5:], of_w))


def test_compiles_without_a_break():
    (x, w), teacher = problem(9, 37, 5, dtype=torch.float32)
    harness.check_compiles(lambda x, w: ce(**teacher)(F.normalize(x), F.normalize(w)), x, w)


def test_deterministic():
    student, teacher = problem(35, 70, 17, dtype=torch.float16)
    with tiles(TILES[0]):
        harness.check_deterministic(ce(**teacher), *student)


def test_zero_stride_gradient():
    student, teacher = problem(9, 37, 5)
    harness.check_zero_stride_grad(ce(**teacher), *student)


def test_backward_inside_autocast():
    student, teacher = problem(9, 17, 5, dtype=torch.float32)
    harness.check_backward_inside_autocast(ce(**teacher), (module._forward, module._backward), *student)


def test_double_backward():
    student, teacher = problem(3, 5, 2)
    harness.check_no_double_backward(ce(**teacher), *student)
    f = ce(**teacher | dict(tau_s=1., tau_t=1.), impl="reference")
    assert torch.autograd.gradgradcheck(f, [x.requires_grad_() for x in student])


def test_only_the_gradients_that_are_wanted():
    """DINO freezes its last layer at first, w_s; and the teacher never gets one."""
    for impl in "auto", "reference":
        for frozen in range(2):
            student, teacher = problem(5, 7, 3)
            both = run(ce(**teacher, impl=impl), student)[1:]
            leaves = [x.requires_grad_() for x in teacher.values()]
            student[1 - frozen].requires_grad_()
            with mock.patch.object(module, "_backward", wraps=module._backward) as backward:
                ce(**teacher, impl=impl)(*student).sum().backward()
            assert backward.call_count == (impl == "auto")
            assert student[1 - frozen].grad.equal(both[1 - frozen]) and student[frozen].grad is None
            assert all(x.grad is None for x in leaves)


def test_saves_only_inputs_and_lse():
    student, teacher = problem(11, 37, 5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        ce(**teacher)(*[x.requires_grad_() for x in student])
        assert sorted(kept) == [(4, 11), (11, 5), (11, 5), (37,), (37, 5), (37, 5)]
        kept.clear()
        with torch.no_grad():
            assert ce(**teacher)(*student).grad_fn is None
        assert not kept


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, impl):
    """x and w, of whatever type, are rounded to the type of autocast; losses and gradients keep theirs."""
    student, teacher = problem(9, 37, 5, dtype=torch.float32)
    taus, c = (.1, .04), teacher.pop("center")

    def f(x_s, w_s):
        return prototype_ce_features(x_s, w_s, *teacher.values(), *taus, c, impl)

    with torch.autocast(DEVICE, low):
        got = run(f, student)
        mixed = prototype_ce_features(student[0].to(low), student[1], *teacher.values(), *taus, c, impl)
    teacher = {k: x.to(low) for k, x in teacher.items()}
    want = run(f, [x.to(low) for x in student])
    assert [t.dtype for t in got] == [torch.float32] * 3
    assert all(a.equal(b.float()) for a, b in zip(got, want, strict=True)) and mixed.equal(got[0])


@pytest.mark.parametrize("shapes, taus, impl, words", [
    ([(5, 3), (7, 4), (5, 3), (7, 3)], (.1, .1), "auto", r"\[7, 4\]"),
    ([(5, 3), (7, 3), (4, 3), (7, 3)], (.1, .1), "auto", r"\[4, 3\]"),
    ([(5, 3), (7, 3), (5, 3), (8, 3)], (.1, .1), "reference", r"\[8, 3\]"),
    ([(5, 3), (7, 3), (5, 4), (7, 4)], (.1, .1), "auto", "R,D"),
    ([(5,), (7, 3), (5,), (7, 3)], (.1, .1), "auto", "R,D"),
    ([(2, 5, 3), (7, 3), (2, 5, 3), (7, 3)], (.1, .1), "auto", "R,D"),
    ([(5, 3), (7, 3), (5, 3), (7, 3), (3,)], (.1, .1), "auto", "center"),
    ([(5, 3), (0, 3), (5, 3), (0, 3)], (.1, .1), "auto", "K, D >= 1"),
    ([(5, 0), (7, 0), (5, 0), (7, 0)], (.1, .1), "auto", "K, D >= 1"),
    ([(5, 3), (7, 3), (5, 3), (7, 3)], (0., .1), "auto", "positive"),
    ([(5, 3), (7, 3), (5, 3), (7, 3)], (.1, math.nan), "reference", "positive"),
    ([(5, 3), (7, 3), (5, 3), (7, 3)], (.1, .1), "cuda", "'cuda'"),
])
def test_errors(shapes, taus, impl, words):
    tensors = [torch.zeros(shape, device=DEVICE) for shape in shapes]
    with pytest.raises(ValueError, match=words):
        prototype_ce_features(*tensors[:4], *taus, *tensors[4:] or [None], impl)


def test_a_temperature_that_learns_needs_the_definition():
    """The kernel would leave it without a gradient."""
    (x, w), tau = problem(5, 7, 3)[0], torch.tensor(.5, device=DEVICE, requires_grad=True)
    for impl in "auto", "triton":
        with pytest.raises(ValueError, match="reference"):
            prototype_ce_features(x, w, x, w, tau, .1, impl=impl)
    impl = "reference"
    prototype_ce_features(x, w, x, w, tau, .1, impl=impl).mean().backward()
    assert tau.grad.abs() > 0


def test_types_may_not_differ():
    (x, w), _ = problem(5, 7, 3)
    with pytest.raises(ValueError, match="one dtype"):
        prototype_ce_features(x, w.float(), x, w, .1, .04)


def test_triton_where_it_cannot_run():
    x, w = torch.zeros(4, 3, device="meta"), torch.zeros(7, 3, device="meta")
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        prototype_ce_features(x, w, x, w, .1, .04, impl="triton")
    assert prototype_ce_features(x, w, x, w, .1, .04).shape == (4,)


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, prototype_features
x, w = torch.zeros(1, 3).requires_grad_(), torch.ones(8, 3)
print(prototype_features.prototype_ce_features(x, w, x, w, .1, .04, w[:, 0]).item())
prototype_features.prototype_ce_features(x, w, x, w, .1, .04).sum().backward()
try: prototype_features.prototype_ce_features(x, w, x, w, .1, .04, None, "triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "prototype_features.py").write_text(Path(module.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    loss, message = out.stdout.splitlines()
    assert float(loss) == pytest.approx(math.log(8), rel=1e-6)
    assert "cannot run on cpu" in message and why in message
