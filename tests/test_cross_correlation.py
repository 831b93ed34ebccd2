"""Barlow Twins, VICReg: each form against the definition, against plain loops, and by its symmetries."""
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
from harness import DEVICE, LAYOUTS, LOW, SCALES, compare, layout, randn, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cross_correlation as cc
from kernels.cross_correlation import (
    barlow_twins_loss,
    barlow_twins_loss_reference,
    vicreg_covariance,
    vicreg_covariance_reference,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
TILES = [dict(BM=16, BN=32, BK=32), dict(BM=32, BN=16, BK=64), dict(BM=64, BN=32, BK=16)]
ROWS = st.sampled_from([2, 3, 7, 15, 16, 17, 33, 37, 67])         # N
WIDTHS = st.sampled_from([1, 2, 5, 15, 16, 17, 31, 32, 34, 70])   # D
LAMS = st.sampled_from([0., .0051, .3, 4.])
KINDS = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
SEEDS = st.integers(0, 2**16)
FORMS = ["triton", "gram"]
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)


def tiles(t):
    """Run with this tile, whatever the table says."""
    return mock.patch.object(cc, "_tiles", lambda D, itemsize, shared: t | dict(num_warps=4, num_stages=1))


def views(N, D, seed=0, scale=1.):
    """Two views that share some of each feature, and features that share some of each other."""
    z1, noise, common = randn(N, D, seed=seed), randn(N, D, seed=seed + 1), randn(N, 1, seed=seed + 2)
    return scale * (z1 + .5 * common), scale * (.6 * z1 + .8 * noise + .3 * common)


def penalty(a, b, n, on, off):
    """sum_ij W_ij (C - I)_ij^2 of embeddings that are standardised, in plain autograd."""
    c = (a.T @ b).to(torch.promote_types(a.dtype, torch.float32)) / n
    eye = torch.eye(a.shape[1], dtype=c.dtype, device=c.device)
    return ((off + (on - off) * eye) * (c - eye).square()).sum()


def plain(a, b, n, on, off, impl):
    """penalty(), or the same from the N x N products where only these tell what rounding costs them."""
    if impl != "gram" or len(a) < .75 * a.shape[1]:
        return penalty(a, b, n, on, off)
    acc = torch.promote_types(a.dtype, torch.float32)
    c = (a.to(acc) * b.to(acc)).sum(0) / n
    total = ((a @ a.T).to(acc) / n * ((b @ b.T).to(acc) / n)).sum()
    return on * (c - 1).square().sum() + off * (total - c.square().sum())


def terms(a, b, n, on, off, impl, slope=1., go=1.):
    """What loss and gradients move by an ulp of if each C_ij, or in gram each A_nm and B_nm, does: the sums
    of the sizes of their terms. In fp32 the sums over N or D round at each term, at random.
    b: None for a; slope: of a over z, at most."""
    twin, rounds = b is None, max(a.shape)**.5 if a.dtype == torch.float32 else 1
    a, b = a.double(), (a if twin else b).double()
    c, eye = a.T @ b / n, torch.eye(a.shape[1], device=a.device)
    w, size = off + (on - off) * eye, torch.maximum(c.abs(), eye)
    k = torch.stack([a @ a.T, b @ b.T]).abs() / n * (impl == "gram")
    loss = 2 * max((w * size * (c - eye).abs()).sum(), off * (k[0] * k[1]).sum())
    a, b = a.abs(), b.abs()
    grad = max(x.max() for x in (b @ (w * size).T, a @ (w * size), off * k[1] @ a, off * k[0] @ b))
    return [float(loss) * rounds] + [float(grad) * rounds * slope * go * (4 if twin else 2) / n] * 2


def three_way(a, b, n, on, off, impl, go=1.):
    """The operators, on embeddings that need no standardising and are exact in their dtype."""
    compare(lambda a, b=None: cc._loss(a, b, n, on, off, impl),
            lambda a, b=None: plain(a, a if b is None else b, n, on, off, impl),
            [a] if b is None else [a, b], terms(a, b, n, on, off, impl, go=go), go)


def through(f, z, dtype):
    """f(z) with the value it has in dtype, which is what a GEMM sees, and the gradient in that of z."""
    h = f(z)
    return h + (f(z.to(dtype)).to(h.dtype) - h).detach()


def barlow_three_way(z1, z2, lam, impl):
    N, dtype = len(z1), z1.dtype
    std = min(z.double().var(0, correction=0).min().item() + 1e-5 for z in (z1, z2))**.5
    a, b = map(cc._standardise, (z1, z2))
    compare(partial(barlow_twins_loss, lam=lam, impl=impl), lambda *z: plain(
        *(through(cc._standardise, z, dtype) for z in z), N, 1., lam, impl), [z1, z2],
            terms(a, b, N, 1., lam, impl, 1 / std))


def vicreg_three_way(z, impl):
    (N, D), dtype = z.shape, z.dtype

    def reference(z):
        a = through(cc._centre, z, dtype)
        return plain(a, a, N - 1, 0., 1 / D, impl)

    largest = terms(cc._centre(z), None, N - 1, 0., 1 / D, impl)
    compare(partial(vicreg_covariance, impl=impl), reference, [z], largest)


# ---- against the definition

@settings(max_examples=40)
@given(ROWS, WIDTHS, LAMS, SEEDS, st.sampled_from(SCALES), st.sampled_from(LAYOUTS), st.sampled_from(TILES),
       st.sampled_from(FORMS))
def test_float64(N, D, lam, seed, scale, kind, tile, impl):
    z1, z2 = (layout(z, kind) for z in views(N, D, seed, scale))
    with tiles(tile):
        barlow_three_way(z1, z2, lam, impl)
        vicreg_three_way(z1, impl)


@settings(max_examples=20)
@given(ROWS, WIDTHS, LAMS, SEEDS, st.sampled_from(FORMS))
def test_float64_definition(N, D, lam, seed, impl):
    """barlow_three_way() has the definition of the tests; this is the file's."""
    z1, z2 = views(N, D, seed)
    largest = terms(*map(cc._standardise, (z1, z2)), N, 1., lam, impl, 300.)
    compare(partial(barlow_twins_loss, lam=lam, impl=impl), partial(barlow_twins_loss_reference, lam=lam),
            [z1, z2], largest)
    compare(partial(vicreg_covariance, impl=impl), vicreg_covariance_reference, [z1], largest)


@settings(max_examples=50)
@given(ROWS, WIDTHS, LAMS, SEEDS, st.sampled_from(SCALES), KINDS, st.sampled_from(TILES),
       st.sampled_from([*LOW, torch.float64]), st.sampled_from(FORMS), st.booleans())
def test_three_way(N, D, lam, seed, scale, kinds, tile, dtype, impl, twin):
    a, b = ((scale * z if twin else cc._standardise(z)).to(dtype) for z in views(N, D, seed))
    a, b = layout(a, kinds[0]), layout(b, kinds[1])
    go = min(scale**-3, 1e4)                                      # or the exact gradient leaves fp16
    with tiles(tile):
        three_way(a, None if twin else b, N, *((0., 1 / D) if twin else (1., lam)), impl, go if twin else 1.)


@settings(max_examples=50)
@given(ROWS, WIDTHS, LAMS, SEEDS, st.sampled_from(LOW), st.sampled_from(FORMS))
def test_three_way_through_the_statistics(N, D, lam, seed, dtype, impl):
    z1, z2 = (z.to(dtype) for z in views(N, D, seed))
    barlow_three_way(z1, z2, lam, impl)
    vicreg_three_way(z1, impl)


@pytest.mark.parametrize("N, D", [(70, 67), (300, 260), (96, 2100)] if DEVICE == "cuda" else [(70, 67)])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_tiles_of_the_table(N, D, dtype):
    three_way(*(cc._standardise(z).to(dtype) for z in views(N, D)), N, 1., .0051, "triton")


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_operators_without_kernel(dtype):
    a, b = (layout(cc._standardise(z).to(dtype), "transposed") for z in views(34, 17))
    with cc._forward.set_kernel_enabled(DEVICE, enabled=False):
        with mock.patch.object(cc, "_tiles", side_effect=AssertionError("the kernel ran")):
            three_way(a, b, 34, 1., .0051, "auto")
            three_way(a, None, 33, 0., 1 / 17, "auto")


def columns(z):
    return [list(column) for column in zip(*z.tolist(), strict=True)]


def paper_barlow(z1, z2, lam):
    """Eq. 1 and 2 in loops over numbers; 1e-5 is BatchNorm's eps, whose variance divides by N."""
    def standardised(z):
        mean = sum(z) / len(z)
        std = math.sqrt(sum((x - mean)**2 for x in z) / len(z) + 1e-5)
        return [(x - mean) / std for x in z]

    a, b = ([standardised(z) for z in columns(z)] for z in (z1, z2))
    c = [[sum(x * y for x, y in zip(u, v, strict=True)) / len(u) for v in b] for u in a]
    D = len(c)
    return sum((1 - c[i][i])**2 for i in range(D)) + lam * sum(
        c[i][j]**2 for i in range(D) for j in range(D) if i != j)


def paper_vicreg(z):
    """Eq. 3 and 4 in loops over numbers."""
    a = [[x - sum(z) / len(z) for x in z] for z in columns(z)]
    return sum((sum(x * y for x, y in zip(u, v, strict=True)) / (len(z) - 1))**2
               for u in a for v in a if u is not v) / len(a)


@pytest.mark.parametrize("impl", ["triton", "gram", "reference"])
@pytest.mark.parametrize("N, D", [(2, 3), (5, 1), (3, 7), (9, 4)])
def test_papers_formulas(N, D, impl):
    z1, z2 = views(N, D, seed=N)
    for f, paper, inputs in [
            (partial(barlow_twins_loss, lam=.3, impl=impl), partial(paper_barlow, lam=.3), [z1, z2]),
            (partial(vicreg_covariance, impl=impl), paper_vicreg, [z1])]:
        loss, *grads = run(f, inputs)
        assert loss.item() == pytest.approx(paper(*inputs), rel=1e-12, abs=1e-13)
        h = 1e-5
        for k, dz in enumerate(grads):                            # central differences, without autograd
            for i, d in [(0, 0), (N // 2, D - 1), (N - 1, 0)]:
                step = [torch.zeros_like(z1) for _ in grads]
                step[k][i, d] = h
                up, down = ([z + sign * s for z, s in zip(inputs, step, strict=True)] for sign in (1, -1))
                slope = (paper(*up) - paper(*down)) / (2 * h)
                assert dz[i, d].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


# ---- values known by hand

BIG = 2.**20                                                      # beside such a deviation eps is nothing


def hadamard(n):
    """[2^n,2^n] of 1 and -1, columns orthogonal, the first constant."""
    h = torch.ones(1, 1, dtype=torch.float64, device=DEVICE)
    for _ in range(n):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize("impl", [*FORMS, "reference"])
def test_views_alike_and_features_orthogonal(impl):
    """C = I, the minimum: loss and gradient are 0. With eps, C_ii = 1 / (1 + 1e-5)."""
    z = hadamard(3)[:, 1:]
    loss, *grads = run(partial(barlow_twins_loss, lam=.5, impl=impl), [BIG * z, BIG * z + 3.])
    assert abs(loss.item()) < 1e-14 and all(dz.abs().max() < 1e-14 for dz in grads)
    assert barlow_twins_loss(z, z, .5, impl).item() == pytest.approx(7 * 1e-10, rel=1e-4, abs=1e-14)
    loss, dz = run(partial(vicreg_covariance, impl=impl), [z])
    assert abs(loss.item()) < 1e-14 and dz.abs().max() < 1e-14


@pytest.mark.parametrize("impl", [*FORMS, "reference"])
def test_two_images(impl):
    """N = 2: every feature is 1 and -1 or -1 and 1, so C_ij = +-1: lam D(D-1), and 4 for each feature whose
    views disagree; nothing but such a flip changes it, so the gradient is 0. One image: C = 0, and D."""
    z1, z2 = BIG * randn(2, 5), BIG * randn(2, 5, seed=1)
    against = ((z1[0] - z1[1]) * (z2[0] - z2[1]) < 0).sum().item()
    loss, *grads = run(partial(barlow_twins_loss, lam=.3, impl=impl), [z1, z2])
    assert 0 < against < 5 and loss.item() == pytest.approx(.3 * 20 + 4 * against, rel=1e-12)
    assert all(dz.abs().max() * BIG < 1e-9 for dz in grads)
    loss, *grads = run(partial(barlow_twins_loss, lam=.3, impl=impl), [z1[:1] / BIG, z2[:1] / BIG])
    assert loss.item() == pytest.approx(5, rel=1e-12) and all(dz.abs().max() < 1e-12 for dz in grads)


@pytest.mark.parametrize("impl", [*FORMS, "reference"])
def test_collapse(impl):
    """All images embedded alike: Barlow Twins pays D, for the variance is 0; VICReg's covariance nothing."""
    z = randn(1, 9).expand(6, 9)
    assert barlow_twins_loss(z, z, .3, impl).item() == pytest.approx(9, rel=1e-12)
    assert vicreg_covariance(z, impl).item() < 1e-24


@pytest.mark.parametrize("impl", [*FORMS, "reference"])
def test_covariance_of_two_rows(impl):
    """z = (1,2), (-1,-2): C = [[2,4],[4,8]], so (16 + 16) / 2, and dz = 4/D z (C off its diagonal)."""
    z = torch.tensor([[1., 2.], [-1., -2.]], dtype=torch.float64, device=DEVICE)
    loss, dz = run(partial(vicreg_covariance, impl=impl), [z + 7.])
    assert loss.item() == pytest.approx(16, rel=1e-14)
    close(dz, z.flip(1) * 8)


@pytest.mark.parametrize("impl", FORMS)
def test_before_training(impl):
    """Independent features: standardised columns are random directions in N-1 dimensions, so that
    E C_ij^2 = 1/(N-1), i = j or not, and the loss is D + (D + lam D(D-1)) / (N-1). VICReg: (D-1) / (N-1)."""
    N, D, lam = 65, 96, .1
    with tiles(dict.fromkeys(("BM", "BN", "BK"), 128 if DEVICE == "cpu" else 64)):        # of fp64
        pairs = [(randn(N, D, seed=seed), randn(N, D, seed=seed + 100)) for seed in range(6)]
        barlow = [barlow_twins_loss(z1, z2, lam, impl).item() for z1, z2 in pairs]
        vicreg = [vicreg_covariance(z, impl).item() for z, _ in pairs]
    assert sum(barlow) / 6 == pytest.approx(D + (D + lam * D * (D - 1)) / (N - 1), rel=.04)
    assert sum(vicreg) / 6 == pytest.approx((D - 1) / (N - 1), rel=.03)


# ---- symmetries

@settings(max_examples=15)
@given(st.integers(2, 40), st.sampled_from([1, 3, 17, 33]), SEEDS, st.sampled_from(FORMS))
def test_symmetries_of_barlow_twins(N, D, seed, impl):
    z1, z2 = views(N, D, seed, BIG)
    f = partial(barlow_twins_loss, lam=.3, impl=impl)
    loss, d1, d2 = run(f, [z1, z2])
    draw = torch.Generator().manual_seed(seed)
    rows, features = torch.randperm(N, generator=draw), torch.randperm(D, generator=draw)
    a, b = randn(2, D, seed=seed + 9).exp(), BIG * randn(2, D, seed=seed + 10)

    def check(inputs, d1, d2):
        other, *grads = run(f, inputs)
        torch.testing.assert_close(other, loss, rtol=1e-10, atol=1e-10)
        for dz, want in zip(grads, (d1, d2), strict=True):
            torch.testing.assert_close(BIG * dz, BIG * want, rtol=1e-8, atol=1e-8)

    check([z2, z1], d2, d1)
    check([z1[rows], z2[rows]], d1[rows], d2[rows])
    check([z1[:, features], z2[:, features]], d1[:, features], d2[:, features])
    check([a[0] * z1 + b[0], a[1] * z2 + b[1]], d1 / a[0], d2 / a[1])                     # each feature's own
    for z, dz in (z1, d1), (z2, d2):                              # the same, infinitesimally
        assert (BIG * dz.sum(0)).abs().max() < 1e-9 and (z * dz).sum(0).abs().max() < 1e-8
    flip = torch.ones(D, dtype=z1.dtype, device=DEVICE)
    flip[0] = -1                                                  # (1 + C_00)^2 instead of (1 - C_00)^2
    c = (cc._standardise(z1)[:, 0] * cc._standardise(z2)[:, 0]).mean()
    torch.testing.assert_close(f(z1 * flip, z2), loss + 4 * c, rtol=1e-10, atol=1e-10)


@settings(max_examples=15)
@given(st.integers(2, 40), st.sampled_from([1, 3, 17, 33]), SEEDS, st.sampled_from(FORMS))
def test_symmetries_of_the_covariance(N, D, seed, impl):
    z, f = views(N, D, seed)[0], partial(vicreg_covariance, impl=impl)
    loss, dz = run(f, [z])
    draw = torch.Generator().manual_seed(seed)
    rows, features = torch.randperm(N, generator=draw), torch.randperm(D, generator=draw)
    sign = torch.where(torch.rand(D, generator=draw) < .5, -1., 1.).to(z)
    for input, want, power in [
            (z[rows], dz[rows], 0), (z[:, features], dz[:, features], 0), (z + randn(D, seed=seed), dz, 0),
            (z * sign, dz * sign, 0), (4 * z, 64 * dz, 4)]:
        other, grad = run(f, [input])
        torch.testing.assert_close(other, 4**power * loss, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-10)
    close(dz.sum(0), torch.zeros_like(dz[0]))
    torch.testing.assert_close((z * dz).sum(), 4 * loss, rtol=1e-10, atol=1e-11)          # of degree 4


# ---- extremes

@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("scale", [.01, 1., 30.])
def test_range_of_fp16(scale, impl):
    """What is kept for the backward has neither overflowed nor lost its bits: 1 % is 20 roundings."""
    a = (scale * views(300, 41)[0]).half()                        # wants 2^-14 to 2^16 of G, A and B
    loss, dz = run(partial(vicreg_covariance, impl=impl), [a], 1 / scale**3)
    want = run(vicreg_covariance_reference, [a.double()], 1 / scale**3)
    assert (loss - want[0]).abs() < 1e-2 * want[0] and (dz - want[1]).abs().max() < 1e-2 * want[1].abs().max()


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", LOW)
def test_diagonal_near_one(dtype, impl):
    """C_ii - 1 is formed before any rounding: with views nearly alike, the gradient keeps its precision."""
    z = cc._standardise(randn(200, 24)).to(dtype)
    a, b = z, (z.double() + .02 * randn(200, 24, seed=1)).to(dtype)
    want = run(lambda a, b: penalty(a, b, 200, 1., 0.), [a.double(), b.double()])
    got = run(lambda a, b: cc._loss(a, b, 200, 1., 0., impl), [a, b])
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() < (4 * torch.finfo(dtype).eps + 1e-4) * y.abs().max()


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_no_bias(dtype, impl):
    """To the nearest, so errors cancel in the sum; cutting bits off would lose half an ulp of it."""
    a, b = (cc._standardise(z).to(dtype) for z in views(70, 64))
    exact = run(lambda a, b: penalty(a, b, 70, 1., .3), [a.double(), b.double()])[1:]
    for dz, want in zip(run(lambda a, b: cc._loss(a, b, 70, 1., .3, impl), [a, b])[1:], exact, strict=True):
        bias = ((dz.double() - want) * want.sign()).sum().abs()
        assert bias < torch.finfo(dtype).eps / 20 * want.abs().sum()


@pytest.mark.parametrize("N", [64, 2])
def test_statistics_in_fp32(N):
    """A mean of 30 deviations, in bf16: the result is rounded to it, neither mean nor variance are."""
    z = (30 + randn(N, 17)).bfloat16()
    for f in cc._standardise, cc._centre:
        exact = f(z.double())
        assert ((f(z) - exact).abs() <= .51 * torch.finfo(z.dtype).eps * exact.abs() + 1e-4).all()
    norm = torch.nn.BatchNorm1d(17, affine=False).to(DEVICE, torch.float64)
    close(cc._standardise(z.double()), norm(z.double()))


@pytest.mark.parametrize("impl", FORMS)
def test_offsets_beyond_int32(impl):
    """Four rows 1.4 GB apart: 3 * stride > 2^31. The memory between is never touched."""
    far = torch.empty(2**31 + 9, dtype=torch.float16, device=DEVICE)
    a, b = (cc._standardise(z).half() for z in views(4, 5))
    three_way(far.as_strided((4, 5), (2**31 // 3 + 1, 1)).copy_(a), b, 4, 1., .3, impl)
    three_way(b, far.as_strided((4, 5), (2**31 // 3 + 1, 1)).copy_(a), 4, 1., .3, impl)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_input_shows(bad, impl):
    z = randn(34, 5)
    z[20, 3] = bad
    with warnings.catch_warnings(action="ignore"):
        assert not barlow_twins_loss(randn(34, 5), z, .1, impl).isfinite()
        assert not vicreg_covariance(z, impl).isfinite()


@pytest.mark.parametrize("impl", FORMS)
def test_gradient_scales_with_the_incoming_one(impl):
    a, b = (cc._standardise(z).half() for z in views(34, 17))
    for go in [0., -2., 1024.]:
        compare(lambda a, b: cc._loss(a, b, 34, 1., .3, impl), lambda a, b: penalty(a, b, 34, 1., .3), [a, b],
                [x * abs(go or 1) for x in terms(a, b, 34, 1., .3, impl)], go)


# ---- the operators

@pytest.mark.parametrize("op", [cc._forward, cc._gram])
def test_opcheck(op):
    a, b = (z.float() for z in views(6, 5))
    for other, out, right in (b, a, b), (None, a, None):
        saved = op(a, other, 6, 1., .3)[1:]
        leaves = [x if x is None else x.clone().requires_grad_() for x in (out, right)]
        torch.library.opcheck(op, (*leaves, 6, 1., .3))
    one = torch.ones((), device=DEVICE)
    args = (saved[0][0], a, a, saved[1]) if op is cc._gram else (a, saved[0].T, None, None)
    torch.library.opcheck(cc._backward, (one, .5, *args, a))


@pytest.mark.parametrize("impl", FORMS)
def test_compiles_without_a_break(impl):
    z1, z2 = (z.float() for z in views(34, 17))
    harness.check_compiles(partial(barlow_twins_loss, lam=.1, impl=impl), z1, z2)
    harness.check_compiles(partial(vicreg_covariance, impl=impl), z1)


@pytest.mark.parametrize("impl", FORMS)
def test_deterministic(impl):
    z1, z2 = (z.half() for z in views(70, 33))
    harness.check_deterministic(partial(barlow_twins_loss, lam=.1, impl=impl), z1, z2)


@pytest.mark.parametrize("impl", FORMS)
def test_double_backward(impl):
    z1, z2 = views(6, 5)
    harness.check_no_double_backward(partial(barlow_twins_loss, lam=.1, impl=impl), z1, z2)
    harness.check_no_double_backward(lambda z: barlow_twins_loss(z, z2, .1, impl), z1)
    harness.check_no_double_backward(lambda z: barlow_twins_loss(z1, z, .1, impl), z2)
    harness.check_no_double_backward(partial(vicreg_covariance, impl=impl), z1)


def test_reference_has_second_derivatives():
    z1, z2 = (z.requires_grad_() for z in views(6, 3))
    assert torch.autograd.gradgradcheck(partial(barlow_twins_loss, lam=.1, impl="reference"), (z1, z2))
    assert torch.autograd.gradgradcheck(partial(vicreg_covariance, impl="reference"), z1)


@pytest.mark.parametrize("impl, two, one", [
    ("triton", [70 * 5, 70 * 5, 25], [70 * 5, 25]),                                       # a, b, G
    ("gram", [70 * 5, 70 * 5, 2 * 70 * 70, 5], [70 * 5, 70 * 70, 5])])                    # a, b, A and B, d
def test_saves(impl, two, one):
    kept = []
    a, b = (z.half().requires_grad_() for z in views(70, 5))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cc._loss(a, b, 70, 1., .1, impl)
        assert sorted(t.numel() for t in kept) == sorted(two)
        assert all(t.dtype == torch.half or t.numel() == 5 for t in kept)
        kept.clear()
        cc._loss(a, None, 70, 0., .1, impl)
        assert sorted(t.numel() for t in kept) == sorted(one)
        kept.clear()
        with torch.no_grad():
            assert cc._loss(a, b, 70, 1., .1, impl).grad_fn is None
        assert not kept


@pytest.mark.parametrize("impl", FORMS)
def test_gradient_of_one_view_only(impl):
    z1, z2 = views(34, 17)
    both, calls, backward = run(partial(barlow_twins_loss, lam=.1, impl=impl), [z1, z2])[1:], [], cc._backward
    with mock.patch.object(cc, "_backward", lambda *args: calls.append(1) or backward(*args)):
        assert run(lambda z: barlow_twins_loss(z, z2, .1, impl), [z1])[1].equal(both[0]) and len(calls) == 1
        assert run(lambda z: barlow_twins_loss(z1, z, .1, impl), [z2])[1].equal(both[1]) and len(calls) == 2
        run(partial(vicreg_covariance, impl=impl), [z1])
        assert len(calls) == 3                                    # a = b: one GEMM serves both


@pytest.mark.parametrize("impl", ["triton", "gram", "formulas", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, impl):
    """a and b are rounded to the type of autocast after fp32 statistics; what follows is as without it."""
    z1, z2 = (z.float() for z in views(34, 17))
    z1[:, 0] += 30

    formulas, impl = impl == "formulas", "auto" if impl == "formulas" else impl

    def f(z1, z2):
        return barlow_twins_loss(z1, z2, .1, impl), vicreg_covariance(z1, impl)

    def rounded(z1, z2):
        a, b, z = cc._standardise(z1).to(low), cc._standardise(z2).to(low), cc._centre(z1).to(low)
        if impl == "reference":
            return penalty(a, b, 34, 1., .1), penalty(z, z, 33, 0., 1 / 17)
        return cc._loss(a, b, 34, 1., .1, impl), cc._loss(z, None, 33, 0., 1 / 17, impl)

    with cc._forward.set_kernel_enabled(DEVICE, enabled=not formulas):
        want = run(rounded, [z1, z2])
        with torch.autocast(DEVICE, low):
            got = run(f, [z1, z2])
            assert f(z1.double(), z2.double())[0].dtype == torch.float64
    assert [t.dtype for t in got] == [torch.float32] * 4
    for x, y in zip(got, want, strict=True):
        assert x.allclose(y, 2e-6, 1e-7) if impl == "reference" else x.equal(y)


@pytest.mark.parametrize("N, D, form", [(2, 3, "_gram"), (14, 20, "_gram"), (15, 20, "_forward"),
                                        (3, 4, "_forward"), (2, 1, "_forward"), (40, 20, "_forward")])
def test_auto_goes_by_the_shape(N, D, form):
    """gram below 0.75 D, on every device; a word decides otherwise."""
    used, z = [], randn(N, D)

    def recorded(name):
        op = getattr(cc, name)
        return lambda *args: used.append(name) or op(*args)

    with mock.patch.multiple(cc, _gram=recorded("_gram"), _forward=recorded("_forward")):
        for impl in "auto", "gram", "triton", "reference":
            barlow_twins_loss(z, z, .1, impl)
            vicreg_covariance(z, impl)
    assert used == [form] * 2 + ["_gram"] * 2 + ["_forward"] * 2


@pytest.mark.parametrize("shape, lam, impl, words", [
    ((5,), .1, "auto", r"\[5\]"), ((2, 2, 3), .1, "gram", r"\[2, 2, 3\]"), ((0, 3), .1, "auto", "N >= 1"),
    ((4, 0), .1, "reference", "D >= 1"), ((4, 3), -1., "auto", "at least 0"), ((4, 3), .1, "cuda", "'cuda'"),
    ((4, 3), math.nan, "gram", "got nan"), ((4, 3), math.inf, "reference", "finite"),
    ((4, 3), torch.tensor(.2), "auto", "a number unless"),
])
def test_errors(shape, lam, impl, words):
    z = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match=words):
        barlow_twins_loss(z, z, lam, impl)
    if lam == .1:
        with pytest.raises(ValueError, match=words.replace("N >= 1", "N >= 2")):
            vicreg_covariance(z, impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_errors_of_one_function(impl):
    z = torch.zeros(4, 3, device=DEVICE)
    for other in z[:3], z[:, :1], z.half(), z.to("meta"):
        with pytest.raises(ValueError, match="must be alike"):
            barlow_twins_loss(z, other, .1, impl)
    with pytest.raises(ValueError, match="N >= 2"):
        vicreg_covariance(z[:1], impl)
    with pytest.raises(ValueError, match="floating"):
        vicreg_covariance(z.long(), impl)


def test_triton_where_it_cannot_run():
    z = torch.zeros(4, 3, device="meta")
    for f in partial(barlow_twins_loss, z, z, .1), partial(vicreg_covariance, z):
        with pytest.raises(RuntimeError, match="cannot run on meta"):
            f("triton")
        assert f("auto").shape == f("gram").shape == ()


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, cross_correlation
z = (torch.eye(2) * 8).requires_grad_()
print(cross_correlation.barlow_twins_loss(z, z.flip(0), .5).item())
print(cross_correlation.vicreg_covariance(z).item())
cross_correlation.barlow_twins_loss(z, z, .5).backward()
try: cross_correlation.vicreg_covariance(z, "triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    """N = 2, features opposite: C = [[-1,1],[1,-1]] for views swapped; covariance [[32,-32],[-32,32]]."""
    (tmp_path / "cross_correlation.py").write_text(Path(cc.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    *losses, message = out.stdout.splitlines()
    assert [float(x) for x in losses] == pytest.approx([4 + 4 + .5 * 2, 1024], rel=1e-5)
    assert "cannot run on cpu" in message and why in message
