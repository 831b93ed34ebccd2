"""DINO's cross-entropy: the kernel against its definition, the formula in plain loops, and its symmetries."""
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

from kernels import prototype_ce as module
from kernels.prototype_ce import prototype_ce, prototype_ce_codes

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
TILES = [(1, 4, 32), (2, 4, 16), (4, 2, 16)]                      # SPLITS, BM, BK
ROWS = st.sampled_from([1, 2, 3, 4, 5, 9])
PROTOTYPES = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 33, 37, 67, 71])
TAUS = st.sampled_from([.01, .04, .1, 1.])
FORMS = ["logits", "centred", "codes"]
SEEDS = st.integers(0, 2**16)
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)


def tiles(t):
    """Run with this tile, whatever the table says."""
    SPLITS, BM, BK = t
    return mock.patch.object(module, "_tiles", lambda R, K: (
        SPLITS, dict(BM=BM, BK=BK, num_warps=4, num_stages=1)))


def ce(t, tau_s=.1, tau_t=.04, c=None, form="logits", impl="auto"):
    """The loss as a function of s alone, with the teacher in the type of s."""
    def f(s):
        if form == "codes":
            return prototype_ce_codes(s, t.to(s.dtype), tau_s, impl)
        return prototype_ce(s, t.to(s.dtype), tau_s, tau_t, c if c is None else c.to(s.dtype), impl)
    return f


def problem(form, R, K, seed=0, scale=1.):
    """s, and the arguments of ce."""
    t, c = scale * randn(R, K, seed=seed + 1), scale * randn(K, seed=seed + 2)
    if form == "codes":
        t = (2 * F.softmax(t, 1)).masked_fill(t < -scale, 0.)     # sums differ, and some are 0
    return scale * randn(R, K, seed=seed), dict(t=t, c=c if form == "centred" else None, form=form)


def three_way(s, teacher, seed=3, go=None):
    go = [randn(len(s), seed=seed)] if go is None else go
    compare(ce(**teacher), ce(**teacher, impl="reference"), [s], go=go)


def paper(s, t, c, tau_s, tau_t):
    """The formula in loops over numbers, for one row."""
    def P(x, tau):
        total = sum(math.exp(v / tau) for v in x)
        return [math.exp(v / tau) / total for v in x]

    p_t, p_s = P([a - b for a, b in zip(t, c, strict=True)], tau_t), P(s, tau_s)
    return -sum(a * math.log(b) for a, b in zip(p_t, p_s, strict=True))


# ---- against the definition

@settings(max_examples=40)
@given(ROWS, PROTOTYPES, TAUS, TAUS, SEEDS, st.sampled_from(FORMS), st.sampled_from(LAYOUTS),
       st.sampled_from(LAYOUTS), st.sampled_from(TILES))
def test_float64(R, K, tau_s, tau_t, seed, form, kind_s, kind_t, tile):
    s, teacher = problem(form, R, K, seed)
    teacher |= dict(t=layout(teacher["t"], kind_t), tau_s=tau_s, tau_t=tau_t)
    with tiles(tile):
        three_way(layout(s, kind_s), teacher, seed)


@settings(max_examples=50)
@given(ROWS, PROTOTYPES, TAUS, TAUS, SEEDS, st.sampled_from(FORMS), st.sampled_from(LAYOUTS),
       st.sampled_from(TILES), st.sampled_from(SCALES), st.sampled_from(LOW))
def test_three_way(R, K, tau_s, tau_t, seed, form, kind, tile, scale, dtype):
    s, teacher = problem(form, R, K, seed, scale)
    teacher |= dict(t=layout(teacher["t"].to(dtype), kind), tau_s=tau_s, tau_t=tau_t)
    if teacher["c"] is not None:
        teacher["c"] = teacher["c"].to(dtype)
    with tiles(tile):
        three_way(layout(s.to(dtype), kind), teacher, seed)


@pytest.mark.parametrize("R, K", [(67, 130), (3, 4100)] + [(700, 9001)] * (DEVICE == "cuda"))
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_tiles_of_the_table(R, K, dtype):
    s, teacher = problem("centred", R, K)
    three_way(s.to(dtype), {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in teacher.items()})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_operators_without_kernel(dtype, form):
    s, teacher = problem(form, 5, 17)
    off = partial(module._forward.set_kernel_enabled, DEVICE, enabled=False)
    with off(), module._backward.set_kernel_enabled(DEVICE, enabled=False):
        with mock.patch.object(module, "_plan", side_effect=AssertionError("the kernel ran")):
            three_way(layout(s.to(dtype), "transposed"), teacher | dict(t=teacher["t"].to(dtype)))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("K, tau_s, tau_t", [(2, .5, .3), (5, 1., .7), (21, .1, .2)])
def test_paper_formula(K, tau_s, tau_t, impl):
    s, t, c = randn(3, K, seed=K), randn(3, K, seed=1), randn(K, seed=2)
    loss, ds = run(ce(t, tau_s, tau_t, c, impl=impl), [s])
    h = 1e-5
    for i in range(3):
        row = partial(paper, t=t[i].tolist(), c=c.tolist(), tau_s=tau_s, tau_t=tau_t)
        assert loss[i].item() == pytest.approx(row(s[i].tolist()), rel=1e-12)
        step = torch.zeros_like(s[i])
        step[i % K] = h                                           # central differences, without autograd
        slope = (row((s[i] + step).tolist()) - row((s[i] - step).tolist())) / (2 * h)
        assert ds[i, i % K].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@settings(max_examples=6)
@given(ROWS, PROTOTYPES, SEEDS)
def test_codes_are_probabilities(R, K, seed):
    """Codes = the teacher's softmax: the same loss. And it is linear in the codes, so several teacher crops
    can be averaged first."""
    s, t, u = (randn(R, K, seed=seed + i) for i in range(3))
    p, q = F.softmax(t / .04, 1), F.softmax(u / .04, 1)
    with tiles((2, 4, 16)):
        one, both = run(ce(t), [s]), run(ce((p + 3 * q) / 4, form="codes"), [s])
        close(run(ce(p, form="codes"), [s]), one)
        close(both, [(a + 3 * b) / 4 for a, b in zip(one, run(ce(u), [s]), strict=True)])


# ---- values known by hand

@pytest.mark.parametrize("K", [1, 2, 33, 4096])
def test_uniform_student_is_at_ln_K(K):
    """The level at which a collapsed run stays, whatever its teacher: 8.318 for 4096 prototypes."""
    for dtype in [*LOW, torch.float64]:
        for t in torch.zeros(1, K, device=DEVICE), randn(1, K):
            loss, ds = run(ce(t), [torch.full((1, K), 3., dtype=dtype, device=DEVICE)])
            assert loss.item() == pytest.approx(math.log(K), rel=1e-6)
            close(ds.double(), (1 / K - F.softmax(t.to(dtype).double() / .04, 1)) / .1, rtol=8e-3, atol=1e-6)


def test_one_prototype():
    """K = 1: loss and gradient are 0, not nearly 0."""
    for dtype in [*LOW, torch.float64]:
        loss, ds = run(ce(randn(5, 1), c=randn(1, seed=1)), [randn(5, 1, seed=2).to(dtype)])
        assert not loss.any() and not ds.any()


def test_a_student_that_equals_its_teacher():
    """p = 1/2, 1/4, 1/8, 1/8: the loss is the entropy, 7/4 bits, and the gradient vanishes."""
    t = .3 * torch.tensor([[.5, .25, .125, .125]], dtype=torch.float64, device=DEVICE).log() + 7
    with tiles((2, 1, 2)):
        loss, ds = run(ce(t, .3, .3), [t])
    assert loss.item() == pytest.approx(1.75 * math.log(2), rel=1e-13)
    assert ds.abs().max() < 1e-13


@settings(max_examples=6)
@given(ROWS, PROTOTYPES, SEEDS)
def test_entropy_is_the_least(R, K, seed):
    """Gibbs: no student has a loss below the teacher's entropy, and with the teacher's logits it has that."""
    t = randn(R, K, seed=seed)
    p = F.softmax(t / .1, 1)
    entropy = -(p * p.log()).sum(1)
    with tiles((2, 4, 16)):
        loss, ds = run(ce(t, .1, .1), [t])
        close(loss, entropy)
        assert ds.abs().max() < 1e-12
        assert (ce(t, .1, .1)(randn(R, K, seed=seed + 1)) >= entropy - 1e-12).all()


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_sure_teacher(dtype):
    """Logits +-1e4: one-hot, so the loss is -log p_s(k), the cross-entropy with a label."""
    s = randn(5, 37).to(dtype)
    label = torch.tensor([0, 15, 16, 36, 20], device=DEVICE)
    t = torch.full((5, 37), -1e4, dtype=dtype, device=DEVICE).scatter(1, label[:, None], 1e4)
    with tiles((2, 4, 16)):
        loss, ds = run(ce(t), [s])
    want = run(lambda s: F.cross_entropy(s / .1, label, reduction="none"), [s.double()])
    tol = 1e-12 if dtype == torch.float64 else 1e-6
    close(loss.double(), want[0], rtol=tol, atol=tol)
    close(ds.double(), want[1], rtol=torch.finfo(dtype).eps, atol=10 * tol)


# ---- symmetries

@settings(max_examples=6)
@given(ROWS, PROTOTYPES, SEEDS, st.sampled_from(TILES))
def test_symmetries(R, K, seed, tile):
    s, t, c = randn(R, K, seed=seed), randn(R, K, seed=seed + 1), randn(K, seed=seed + 2)
    go = [randn(R, seed=seed + 3)]
    with tiles((1, 4, 256)):
        loss, ds = run(ce(t, c=c), [s], go)

    def check(f, s, a=1.):
        other, grad = run(f, [s], go)
        close(other, loss)
        close(a * grad, ds)

    with tiles(tile):
        row, order = 9 * randn(R, 1, seed=seed + 4), torch.randperm(K, generator=torch.manual_seed(seed))
        check(ce(t, c=c), s + row)                                    # a constant per row, student
        check(ce(t + row, c=c), s)                                    # teacher
        check(ce(t, c=c + 5), s)                                      # centre
        check(ce(t - c), s)                                           # it is subtracted
        check(ce(4 * t, .3, .16, 4 * c), 3 * s, 3.)                   # larger logits, higher temperatures
        other, grad = run(ce(t[:, order], c=c[order]), [s[:, order]], go)
        close(other, loss)                                            # prototypes have no order
        close(grad, ds[:, order])
        close(run(ce(t[-1:], c=c), [s[-1:]], [go[0][-1:]]), [loss[-1:], ds[-1:]])      # rows are independent
        assert ds.sum(1).abs().max() < 1e-12 * (1 + ds.abs().max())   # shift of s, infinitesimally


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("form", FORMS)
def test_far_from_zero(dtype, form):
    """n u and 512 u + n u are exact for n < 4: the same loss to 1e-6, though ulp(512 u / tau) is more."""
    n, unit = torch.randint(4, (3, 5, 37), generator=torch.Generator().manual_seed(0)).to(DEVICE), 8.
    with tiles((2, 4, 16)):
        def at(far):
            t = F.softmax(n[1].double(), 1) if form == "codes" else n[1] * unit + far
            f = ce(t, unit / 3, unit / 3, n[2, 0] * unit if form == "centred" else None, form)
            return run(f, [(n[0] * unit + far).to(dtype)])

        far, near = at(512 * unit if dtype != torch.bfloat16 else 32 * unit), at(0)
    close(far[0], near[0], rtol=1e-6, atol=0)
    close(far[1], near[1], rtol=torch.finfo(dtype).eps, atol=1e-7)


# ---- extremes

@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gone", [slice(0, 16), slice(16, 37), slice(3, 36, 2), slice(0, 36)],
                         ids=["first block", "the rest", "odd", "all but one"])
def test_prototypes_that_neither_has(dtype, form, gone):
    """s = -inf and no mass: the loss is that of the other prototypes, the gradient there exactly 0."""
    s, teacher = problem(form, 5, 37)
    s, t, c = s.to(dtype), teacher["t"].to(dtype), teacher["c"]
    keep = torch.ones(37, dtype=torch.bool, device=DEVICE)
    keep[gone] = False
    f = partial(ce, form=form)
    with tiles((2, 4, 16)):
        want = run(f(t[:, keep], c=c if c is None else c[keep]), [s[:, keep]])
        s, t = s.masked_fill(~keep, -math.inf), t.masked_fill(~keep, 0. if form == "codes" else -math.inf)
        loss, ds = run(f(t, c=c), [s])
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    close(loss, want[0], rtol=tol, atol=tol)
    close(ds[:, keep], want[1], rtol=max(tol, 2 * torch.finfo(dtype).eps), atol=10 * tol)
    assert not ds[:, ~keep].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", TILES)
def test_a_student_that_excludes_what_the_teacher_sees(form, tile):
    """s = -inf with mass: the loss of that row is infinite, of the others finite, every gradient finite."""
    s, teacher = problem(form, 5, 67)
    s[2, 40] = -math.inf
    teacher["t"][2, 40] = 5.
    with tiles(tile):
        loss, ds = run(ce(**teacher), [s.float()])
    assert loss[2] == math.inf and loss.isfinite().sum() == 4 and ds.isfinite().all()
    close(ds, run(ce(**teacher, impl="reference"), [s.float()])[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", TILES)
def test_mass_that_vanishes_on_the_way(tile):
    """Teacher logits rise by 60 per block: what had all the mass at first ends with e^-120, 0 in fp32."""
    t = torch.zeros(3, 67, device=DEVICE)
    t[:, 16:], t[:, 32:] = 60, 120
    s = randn(3, 67).float()
    s[:, 5] = -math.inf
    with tiles(tile):
        loss, ds = run(ce(t, tau_t=1.), [s])
    want = run(ce(t[:, 32:], tau_t=1., impl="reference"), [s[:, 32:]])[0]
    p = F.softmax(s.double() / .1, 1)[:, 32:].sum(1)              # the student's mass there
    close(loss.double(), want.double() - p.log(), rtol=1e-6, atol=0)
    assert ds.isfinite().all()


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("form", ["logits", "codes"])
@pytest.mark.parametrize("gap", [2., 8.])
def test_gradient_where_the_student_is_nearly_sure(dtype, form, gap):
    """p - 1 must be formed in fp32: rounded first, p = 0.9997 is 1 in bf16 and the gradient 0."""
    s = torch.zeros(1, 3, dtype=dtype, device=DEVICE)
    s[0, 1] = gap
    t = torch.tensor([[0., 1., 0.]], device=DEVICE) * (1. if form == "codes" else 1e4)
    ds = run(ce(t, 1., 1., form=form), [s])[1].double()
    rest = 1 / (math.exp(gap) + 2)                                # each of the two others
    want = torch.tensor([[rest, -2 * rest, rest]], dtype=torch.float64, device=DEVICE)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    close(ds, want, rtol=torch.finfo(dtype).eps + eps / rest, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_no_bias(dtype):
    """To the nearest, so errors cancel in the sum; cutting bits off would lose half an ulp of it."""
    s, teacher = problem("logits", 8, 600)
    s = s.to(dtype)
    exact = run(ce(teacher["t"].to(dtype).double(), 1., 1.), [s.double()])[1]
    ds = run(ce(teacher["t"], 1., 1.), [s])[1].double()
    assert ((ds - exact) * exact.sign()).sum().abs() < torch.finfo(dtype).eps / 20 * exact.abs().sum()


def test_no_rows():
    for form in FORMS:
        s, teacher = problem(form, 0, 7)
        for impl in "auto", "reference":
            loss, ds = run(ce(**teacher, impl=impl), [s.half()])
            assert (loss.shape, loss.dtype) == ((0,), torch.float32)
            assert (ds.shape, ds.dtype) == ((0, 7), torch.float16)


@pytest.mark.parametrize("form", FORMS)
def test_incoming_gradients(form):
    """Each row has its own; a row that is masked, go = 0, gets exactly 0; they scale what goes out."""
    s, teacher = problem(form, 9, 37)
    go = randn(9, seed=5)
    go[3:6] = 0
    with tiles((1, 4, 32)):
        three_way(s.half(), teacher | dict(t=teacher["t"].half()), go=[go])
        ds, more = (run(ce(**teacher), [s], [a * go])[1] for a in (1, -64))
    assert not ds[3:6].any() and ds[[*range(3), *range(6, 9)]].any(1).all()
    assert more.equal(-64 * ds)


def test_offsets_beyond_int32():
    """Four rows 1.4 GB apart: 3 * stride > 2^31. The memory between is never touched."""
    far = torch.empty(2**31 + 9, dtype=torch.float16, device=DEVICE)
    s, t = randn(4, 5).half(), randn(4, 5, seed=1).half()
    apart = far.as_strided((4, 5), (2**31 // 3 + 1, 1))
    want = run(ce(t), [s])
    assert all(map(torch.equal, run(ce(t), [apart.copy_(s)]), want))
    assert all(map(torch.equal, run(ce(apart.copy_(t)), [s]), want))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_input_shows(bad, form):
    for where in ["s", "t", "c"][:3 if form == "centred" else 2]:
        s, teacher = problem(form, 5, 37)
        (s if where == "s" else teacher[where])[..., 20] = -bad if where == "c" else bad   # inf: a mask
        with warnings.catch_warnings(action="ignore"), tiles((2, 4, 16)):
            assert not ce(**teacher)(s).isfinite().any()


# ---- the operator

@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    s, teacher = problem(form, 5, 7)
    args = s.float(), teacher["t"].float(), teacher["c"], .1, 0. if form == "codes" else .04
    _, lse = module._forward(*args)
    torch.library.opcheck(module._forward, (args[0].requires_grad_(), *args[1:]))
    go = torch.ones(5, dtype=lse.dtype, device=DEVICE)
    torch.library.opcheck(module._backward, (go, s.float(), *args[1:3], lse, *args[3:]))


@pytest.mark.parametrize("form", ["centred", "codes"])
def test_compiles_without_a_break(form):
    s, teacher = problem(form, 5, 37)
    harness.check_compiles(lambda s: ce(**teacher)(2 * s), s.float())


def test_deterministic():
    s, teacher = problem("centred", 7, 300)
    with tiles((4, 4, 32)):
        harness.check_deterministic(ce(**teacher), s.half())


def test_zero_stride_gradient():
    s, teacher = problem("logits", 7, 37)
    harness.check_zero_stride_grad(ce(**teacher), s)
    with tiles((1, 4, 16)):                                       # and other strides
        go = layout(randn(7, 2), "row-strided")[:, 1]
        close(run(ce(**teacher), [s], [go])[1], run(ce(**teacher), [s], [go.clone()])[1], rtol=0, atol=0)


def test_backward_inside_autocast():
    t, operators = randn(9, 17, seed=1), (module._forward, module._backward)
    harness.check_backward_inside_autocast(ce(t), operators, randn(9, 17).float())


def test_double_backward():
    s, teacher = problem("centred", 3, 5)
    harness.check_no_double_backward(ce(**teacher), s)
    harness.check_no_double_backward(ce(F.softmax(s, 1), form="codes"), s)
    f = ce(**teacher | dict(tau_s=1., tau_t=1.), impl="reference")
    assert torch.autograd.gradgradcheck(f, s.requires_grad_())


def test_the_teacher_gets_no_gradient():
    for form in FORMS:
        for impl in "auto", "reference":
            s, teacher = problem(form, 3, 7)
            leaves = [x.requires_grad_() for x in (teacher["t"], teacher["c"]) if x is not None]
            assert not ce(**teacher, impl=impl)(s).requires_grad
            ce(**teacher, impl=impl)(s.requires_grad_()).sum().backward()
            assert s.grad.any() and all(x.grad is None for x in leaves)


def test_saves_only_inputs_and_lse():
    s, teacher = problem("centred", 11, 37)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        ce(**teacher)(s.requires_grad_())
        assert sorted(kept) == [(4, 11), (11, 37), (11, 37), (37,)]
        kept.clear()
        with torch.no_grad():
            assert ce(**teacher)(s).grad_fn is None
        assert not kept


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_types_may_differ(form, impl):
    """bf16 logits, an fp32 teacher and an fp64 centre, as autocast makes them; it changes nothing here."""
    s, teacher = problem(form, 5, 37)
    low, t, c = s.bfloat16(), teacher["t"].float(), teacher["c"]
    c = c if c is None else c.float()

    def f(s):
        return prototype_ce_codes(s, t, .1, impl) if c is None and form == "codes" else prototype_ce(
            s, t, .1, .04, c, impl)

    loss, ds = run(f, [low])
    assert (loss.dtype, ds.dtype) == (torch.float32, torch.bfloat16)
    exact = run(ce(t.double(), c=c, form=form, impl="reference"), [low.double()])
    close(loss.double(), exact[0], rtol=1e-5, atol=1e-6)
    close(ds.double(), exact[1], rtol=4e-3, atol=1e-5)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(map(torch.equal, run(f, [low]), (loss, ds)))


@pytest.mark.parametrize("s, t, c, taus, impl, words", [
    ((5, 3), (5, 4), None, (.1, .1), "auto", r"\[5, 3\], \[5, 4\]"),
    ((4, 3), (1, 3), None, (.1, .1), "auto", "R,K"),
    ((4,), (4,), None, (.1, .1), "auto", "R,K"),
    ((2, 2, 3), (2, 2, 3), None, (.1, .1), "auto", "R,K"),
    ((4, 0), (4, 0), None, (.1, .1), "auto", "K >= 1"),
    ((4, 3), (4, 3), (4,), (.1, .1), "reference", r"\[4\]"),
    ((4, 3), (4, 3), (1, 3), (.1, .1), "auto", "centre"),
    ((4, 3), (4, 3), None, (0., .1), "auto", "positive"),
    ((4, 3), (4, 3), None, (math.nan, .1), "reference", "positive"),
    ((4, 3), (4, 3), None, (.1, 0.), "auto", "positive"),
    ((4, 3), (4, 3), None, (.1, math.nan), "reference", "positive"),
    ((4, 3), (4, 3), None, (.1, None), "auto", "positive"),
    ((4, 3), (4, 3), None, (.1, .1), "cuda", "'cuda'"),
])
def test_errors(s, t, c, taus, impl, words):
    s, t, c = (x if x is None else torch.zeros(x, device=DEVICE) for x in (s, t, c))
    with pytest.raises(ValueError, match=words):
        prototype_ce(s, t, *taus, c, impl)
    if taus[1] == .1 and c is None:
        with pytest.raises(ValueError, match=words):
            prototype_ce_codes(s, t, taus[0], impl)


def test_a_temperature_that_learns_needs_the_definition():
    """The kernel would leave it without a gradient."""
    s, tau = torch.randn(4, 3, device=DEVICE), torch.tensor(.5, device=DEVICE, requires_grad=True)
    for impl in "auto", "triton":
        with pytest.raises(ValueError, match="reference"):
            prototype_ce(s, s, tau, .1, impl=impl)
    impl = "reference"
    prototype_ce(s, s, tau, .1, impl=impl).mean().backward()
    assert tau.grad.abs() > 0


def test_triton_where_it_cannot_run():
    s = torch.zeros(4, 3, device="meta")
    for call in partial(prototype_ce, s, s, .1, .1), partial(prototype_ce_codes, s, s, .1):
        with pytest.raises(RuntimeError, match="cannot run on meta"):
            call(impl="triton")
        assert call().shape == (4,)


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, prototype_ce
s = torch.zeros(1, 8).requires_grad_()
print(prototype_ce.prototype_ce(s, s, .1, .04, s[0]).item())
prototype_ce.prototype_ce(s, s, .1, .04).sum().backward()
try: prototype_ce.prototype_ce_codes(s, s, .1, "triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "prototype_ce.py").write_text(Path(module.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    loss, message = out.stdout.splitlines()
    assert float(loss) == pytest.approx(math.log(8), rel=1e-6)
    assert "cannot run on cpu" in message and why in message
