"""Slot attention: the kernel against its definition, against the formula in loops, and by its symmetries."""
import math
import os
import re
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

from kernels import slot_attention as module
from kernels.slot_attention import slot_attention, slot_attention_reference

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
kernel = partial(slot_attention, impl="triton")
SHAPES = st.sampled_from([(1, 3), (2, 1), (3, 7), (7, 33), (11, 16), (15, 67), (16, 17), (17, 15), (24, 31),
                          (33, 2)])                               # S, D
INPUTS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 65, 70])               # N; from 65 on two programs
BLOCKS = st.sampled_from([16, 32, 128 if DEVICE == "cpu" else 64])        # BN; a GPU holds no 128 in fp64
SEEDS = st.integers(0, 2**16)
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)


def tiles(BN):
    """Run with tiles of this many inputs, whatever the table says."""
    table = module._tiles
    return mock.patch.object(module, "_tiles", lambda *a: table(*a) | dict(BN=BN, num_warps=4, num_stages=1))


def slots(B, S, N, D, seed=0, dtype=torch.float64, scale=1.):
    return [randn(B, n, D, seed=seed + i, scale=scale).to(dtype) for i, n in enumerate((S, N, N))]


def masks(B, S, N, seed):
    """About a third hidden and a quarter off."""
    return dict(mask=randn(B, N, seed=seed) > .4, slot_mask=randn(B, S, seed=seed + 1) > .7)


def terms(inputs, go, eps=1e-8, scale=None, mask=None, slot_mask=None, maps=False):
    """The largest terms of the sums u, a, dq, dk, dv. In dx, du_s . v_n - du_s . u_s may cancel."""
    q, k, v = (x.double() for x in inputs)
    scale = scale or q.shape[2]**-.5
    q, k, v, a, w, total = module._weights(q, k, v, mask, slot_mask, eps, scale)
    du = go[0].abs()
    dx = scale * a * (du @ v.abs().mT / total + (go[1].abs() if maps else 0))     # [B,S,N]
    most = [v, dx.amax(2, True) * k.abs().amax(1, True), dx.amax(1)[:, :, None] * q.abs().amax(1, True),
            (w / total).amax(1)[:, :, None] * du.amax(1, True)]
    return [x.abs().max().item() for x in (most[:1] + [a] * maps + most[1:])]


def three_way(inputs, go=None, f=kernel, **options):
    (B, S, D), N = inputs[0].shape, inputs[1].shape[1]
    if go is None:
        go = [randn(B, S, D, seed=7), randn(B, S, N, seed=8)][:1 + options.get("maps", False)]
    compare(partial(f, **options), partial(slot_attention_reference, **options), inputs,
            terms(inputs, go, **options), go)


def paper(q, k, v, eps=1e-8, scale=None):
    """Algorithm 1, lines 7 and 8, for one image, in loops over numbers: updates and attention."""
    S, N, D = len(q), len(k), len(q[0])
    scale = D**-.5 if scale is None else scale
    e = [[math.exp(scale * sum(a * b for a, b in zip(q[s], k[n], strict=True))) for n in range(N)]
         for s in range(S)]
    attention = [[e[s][n] / sum(row[n] for row in e) for n in range(N)] for s in range(S)]
    updates = []
    for row in attention:
        total = sum(a + eps for a in row)
        updates.append([sum((a + eps) / total * v[n][d] for n, a in enumerate(row)) for d in range(D)])
    return updates, attention


# ---- against the definition

@settings(max_examples=30)
@given(st.integers(1, 3), SHAPES, INPUTS, SEEDS, st.sampled_from(LAYOUTS), BLOCKS, st.booleans(),
       st.booleans())
def test_float64(B, shape, N, seed, kind, BN, masked, maps):
    S, D = shape
    q, k, v = slots(B, S, N, D, seed)
    with tiles(BN):
        three_way([layout(q, "offset"), layout(k, kind), layout(v, "row-strided")], maps=maps,
                  **masks(B, S, N, seed) if masked else {})


@settings(max_examples=40)
@given(st.integers(1, 3), SHAPES, INPUTS, SEEDS, st.sampled_from(SCALES), st.sampled_from(LAYOUTS), BLOCKS,
       st.booleans(), st.booleans(), st.sampled_from(LOW))
def test_three_way(B, shape, N, seed, scale, kind, BN, masked, maps, dtype):
    S, D = shape
    q, k, v = slots(B, S, N, D, seed, dtype, scale)
    with tiles(BN):
        three_way([layout(q, kind), layout(k, "row-strided"), layout(v, kind)], maps=maps,
                  **masks(B, S, N, seed) if masked else {})


@pytest.mark.parametrize("S, D", [(7, 130), (40, 20), (100, 9)])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_tiles_of_the_table(S, D, dtype):
    """In fp64 the widest have 128 columns."""
    three_way(slots(2, S, 70, min(D, 128) if dtype == torch.float64 else D, dtype=dtype), maps=True)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_operators_without_kernel(dtype):
    q, k, v = slots(2, 5, 34, 17, dtype=dtype)
    off = partial(module._forward.set_kernel_enabled, DEVICE, enabled=False)
    with off(), module._backward.set_kernel_enabled(DEVICE, enabled=False):
        with mock.patch.object(module, "_tiles", side_effect=AssertionError("the kernel ran")):
            for options in dict(maps=True), masks(2, 5, 34, 1), dict(maps=True, eps=.1) | masks(2, 5, 34, 2):
                three_way([q, layout(k, "transposed"), v], f=slot_attention, **options)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_operators_without_kernel_stay_fp32_under_autocast(low):
    inputs, f = slots(2, 5, 34, 7, dtype=low), partial(slot_attention, maps=True)
    with module._forward.set_kernel_enabled(DEVICE, enabled=False):
        want = f(*inputs)
        with torch.autocast(DEVICE, low):
            for got in f(*inputs), f(*(x.float() for x in inputs)):
                assert got[0].equal(want[0]) and got[1].equal(want[1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("S, N, D, eps, scale", [(1, 3, 2, .01, None), (3, 1, 4, .5, .3), (7, 5, 3, 0, 1.)])
def test_paper_formula(S, N, D, eps, scale, impl):
    q, k, v = slots(1, S, N, D, seed=S)
    go = randn(1, S, D, seed=5), randn(1, S, N, seed=6)

    def total(*inputs):                                           # of both outputs, weighted by go
        values = paper(*(x[0].tolist() for x in inputs), eps, scale)
        return sum((g[0].cpu() * torch.tensor(x, dtype=g.dtype)).sum().item()
                   for g, x in zip(go, values, strict=True))

    u, a, *grads = run(partial(slot_attention, eps=eps, scale=scale, maps=True, impl=impl), [q, k, v], go)
    want = paper(q[0].tolist(), k[0].tolist(), v[0].tolist(), eps, scale)
    for got, x in zip((u, a), want, strict=True):
        torch.testing.assert_close(got[0].cpu(), torch.tensor(x, dtype=got.dtype), rtol=1e-12, atol=1e-14)
    h = 1e-5
    for i in range(3):                                            # central differences, without autograd
        step = [torch.zeros_like(x) for x in (q, k, v)]
        step[i][0, -1, 0] = h
        up, down = (total(*(x + sign * e for x, e in zip((q, k, v), step, strict=True))) for sign in (1, -1))
        assert grads[i][0, -1, 0].item() == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("S", [*range(1, 25), 33, 64, 100, 128])
def test_every_number_of_slots(S):
    """Slots that pad a tile to 16, 32, 64, 128 take no mass."""
    q, k, v = slots(1, S, 6, 3, seed=S)
    u, a = kernel(q, k, v, maps=True)
    close(a.sum(1), torch.ones_like(a[:, 0]))
    want = paper(q[0].tolist(), k[0].tolist(), v[0].tolist())
    close(u[0].cpu(), torch.tensor(want[0], dtype=u.dtype))
    close(a[0].cpu(), torch.tensor(want[1], dtype=u.dtype))


# ---- values known by hand

@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("S, N", [(1, 1), (7, 37), (33, 70)])
def test_all_inputs_alike(S, N, dtype):
    """A mean of equal values is that value, to fp32: weights are summed as they are rounded, not before."""
    q, k, v = slots(2, S, N, 5, dtype=dtype)
    v = v[:, :1].expand_as(v)
    u = module._forward(q, k, v, None, None, 1e-8, .5, False)[0]  # not yet rounded to dtype
    close(u, v[:, :1].expand_as(u).to(u.dtype), rtol=4 * torch.finfo(u.dtype).eps, atol=0)


def test_one_input():
    """N=1: every slot takes v_1 whole, so q and k matter to the map only."""
    q, k, v = slots(2, 7, 1, 5)
    go = randn(2, 7, 5, seed=4)
    u, dq, dk, dv = run(kernel, [q, k, v], go=[go])
    close(u, v.expand_as(u))
    close(dv, go.sum(1, keepdim=True))
    close(dq, torch.zeros_like(q))
    close(dk, torch.zeros_like(k))


def test_one_slot():
    """S=1: it has all the mass of every input, so u is the mean of v."""
    q, k, v = slots(2, 1, 33, 5)
    u, a, dq, dk, dv = run(partial(kernel, maps=True), [q, k, v], [torch.ones_like(q), k.new_zeros(2, 1, 33)])
    close(u, v.mean(1, keepdim=True))
    assert (a == 1).all() and not dq.any() and not dk.any()
    close(dv, torch.full_like(v, 1 / 33))


def test_two_slots_two_inputs():
    """Inputs e1 e2, slots c e1, c e2, scale 1: a is p where they agree and 1 - p elsewhere."""
    c, eye = 1.7, torch.eye(2, dtype=torch.float64, device=DEVICE)[None]
    u, a, dq, _, dv = run(partial(kernel, scale=1., maps=True, eps=0.), [c * eye, eye, eye], [eye, 0 * eye])
    p = 1 / (1 + math.exp(-c))
    want = p * eye + (1 - p) * eye.flip(1)
    for x in a, u, dv:                                            # u = W I, dv = W^T I, W = W^T
        close(x, want)
    # The logit x_11 moves a_11 by p (1 - p) and a_21 by as much, down; u_11 = a_11 / (a_11 + a_12) follows by
    # (1 - p) of that, u_22 = a_22 / (a_21 + a_22) by p of it, up. d(u_11 + u_22) / dx_11 = p (1 - p).
    assert dq[0, 0, 0].item() == pytest.approx(p * (1 - p), rel=1e-12)


# ---- symmetries and conservation

@settings(max_examples=4)
@given(st.sampled_from([2, 7, 17]), st.sampled_from([2, 17, 70]), SEEDS)
def test_symmetries(S, N, seed):
    D = 5
    q, k, v = slots(2, S, N, D, seed)
    go = randn(2, S, D, seed=seed + 3)
    u, dq, dk, dv = run(kernel, [q, k, v], go=[go])
    generator = torch.Generator().manual_seed(seed)
    i, j = torch.randperm(S, generator=generator), torch.randperm(N, generator=generator)

    def check(inputs, go, want, **options):
        for got, x in zip(run(partial(kernel, **options), inputs, go=[go]), want, strict=True):
            close(got, x)

    turn, shift = torch.linalg.qr(randn(D, D, seed=seed))[0], randn(1, 1, D, seed=seed + 9)
    check([q[:, i], k, v], go[:, i], [u[:, i], dq[:, i], dk, dv])           # slots permuted
    check([q, k[:, j], v[:, j]], go, [u, dq, dk[:, j], dv[:, j]])           # inputs permuted
    check([x.flip(0) for x in (q, k, v)], go.flip(0), [x.flip(0) for x in (u, dq, dk, dv)])         # images
    check([x @ turn for x in (q, k, v)], go @ turn, [x @ turn for x in (u, dq, dk, dv)])  # all turned
    check([q * 4, k, v], go, [u, dq / 4, dk, dv], scale=D**-.5 / 4)         # longer slots, smaller scale
    check([q + shift, k, v], go, [u, dq, dk, dv])                  # all logits of an input shifted
    check([q, k, v + shift], go, [u + shift, dq, dk, dv])                   # a mean moves with its values
    close(dq.sum(1), torch.zeros_like(dq[:, 0]))                            # the shift, infinitesimally
    close(dv.sum(1), go.sum(1))                                             # the weights of a slot sum to 1
    close((q * dq).sum((1, 2)), (k * dk).sum((1, 2)))                       # both are d / d log scale


# ---- masks

@settings(max_examples=10)
@given(st.sampled_from([3, 11, 17]), st.sampled_from([5, 33, 70]), BLOCKS, SEEDS,
       st.sampled_from([torch.float64, torch.float16]))
def test_a_mask_removes(S, N, BN, seed, dtype):
    """What is masked may hold NaN. It is as if it were not there; what it would give is 0."""
    q, k, v = slots(1, S, N, 5, seed, dtype)
    off, hidden = masks(1, S, N, seed)["slot_mask"], masks(1, S, N, seed)["mask"]
    off[0, 0] = hidden[0, 0] = False
    du, da = randn(1, S, 5, seed=4), randn(1, S, N, seed=5)
    on, seen = ~off[0], ~hidden[0]
    q = q.masked_fill(off[:, :, None], math.nan)
    k, v = (x.masked_fill(hidden[:, :, None], math.nan) for x in (k, v))
    with tiles(BN):
        u, a, dq, dk, dv = run(partial(kernel, mask=hidden, slot_mask=off, maps=True), [q, k, v], [du, da])
        want = run(partial(kernel, maps=True), [q[:, on], k[:, seen], v[:, seen]],
                   [du[:, on], da[:, on][:, :, seen]])
    tolerance = dict(rtol=2e-3, atol=1e-4) if dtype == torch.float16 else dict(rtol=1e-11, atol=1e-12)
    got = u[:, on], a[:, on][:, :, seen], dq[:, on], dk[:, seen], dv[:, seen]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    gone = u[:, ~on], a[:, ~on], a[:, :, ~seen], dq[:, ~on], dk[:, ~seen], dv[:, ~seen]
    assert not any(x.any() for x in gone)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("what", ["mask", "slot_mask"])
def test_all_masked_in_one_image(what, dtype):
    """u = 0 there, all gradients 0, not NaN; the other image does not notice."""
    inputs = slots(2, 5, 33, 3, dtype=dtype)
    mask = torch.zeros(2, 33 if what == "mask" else 5, dtype=torch.bool, device=DEVICE)
    mask[0] = True
    go = [randn(2, 5, 3), randn(2, 5, 33)]
    got = run(partial(kernel, maps=True, **{what: mask}), inputs, go)
    assert not any(x[0].any() for x in got)
    alone = run(partial(kernel, maps=True), [x[1:] for x in inputs], [g[1:] for g in go])
    assert all(x[1:].equal(y) for x, y in zip(got, alone, strict=True))
    three_way(inputs, maps=True, **{what: mask})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_empty_slot_without_eps(dtype):
    """No input is near slot 0 and eps is 0: 0 / 0. It gets 0, and so do its gradients, however large du."""
    q, k, v = slots(2, 3, 33, 4, dtype=dtype)
    k[:, :, 0], q[:, 0] = 1, torch.tensor([-4000., 0, 0, 0])
    results = run(partial(kernel, eps=0., maps=True), [q, k, v], [1e20 * randn(2, 3, 4), randn(2, 3, 33)])
    assert not any(x[:, 0].any() for x in results[:3]) and all(x.isfinite().all() for x in results)
    three_way([q, k, v], eps=0., maps=True)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_an_empty_slot_with_eps(dtype):
    """The same with eps: it gets the mean of all inputs, in fp16 too, which holds no 1e-8."""
    q, k, v = slots(2, 3, 33, 4, dtype=dtype)
    k[:, :, 0], q[:, 0] = 1, torch.tensor([-4000., 0, 0, 0])
    u = kernel(q, k, v)[:, 0].double()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(u, v.double().mean(1), rtol=tolerance, atol=tolerance)
    three_way([q, k, v])


# ---- extremes

@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("make", [
    lambda q, k, v: (1e4 * q / q.norm(dim=2, keepdim=True), k / k.norm(dim=2, keepdim=True), v),
    lambda q, k, v: (q[:, :1].expand_as(q) * 100, k, v),
    lambda q, k, v: (0 * q, 0 * k, 100 * v),
], ids=["sharp", "equal", "zero"])
def test_extremes(make, dtype):
    three_way([x.to(dtype) for x in make(*slots(2, 5, 33, 8))], maps=True, scale=1.)


def test_tiny_weights_in_fp16():
    """2048 inputs alike: each weighs 1/2048 and has a gradient below 2^-14, and yet dv is precise."""
    q, k, v = slots(1, 2, 1, 4, dtype=torch.float16)
    go = torch.full((1, 2, 4), 2.**-3)
    with tiles(512):
        dv = run(kernel, [0 * q, k.expand(1, 2048, 4), v.expand(1, 2048, 4)], [go])[3]
    assert (dv == 2 * 2.**-3 / 2048).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_no_bias(dtype):
    """To the nearest, so errors cancel in the sum; cutting bits off would lose half an ulp of it."""
    inputs, go = slots(2, 7, 70, 33, dtype=dtype), [randn(2, 7, 33, seed=5)]
    exact = run(slot_attention_reference, [x.double() for x in inputs], [go[0].to(dtype)])
    for x, e in zip(run(kernel, inputs, go), exact, strict=True):
        assert ((x.double() - e) * e.sign()).sum().abs() < torch.finfo(dtype).eps / 10 * e.abs().sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_far_from_zero(dtype):
    """du . v_n and du . u_s agree to 1 %, and only their difference counts: neither is rounded to dtype."""
    q, k, v = slots(2, 5, 70, 16, dtype=dtype)
    inputs, go = [q, k, (v.double() + 100).to(dtype)], [randn(2, 5, 16, seed=5).to(dtype)]
    exact = run(slot_attention_reference, [x.double() for x in inputs], go)
    for x, e in zip(run(kernel, inputs, go), exact, strict=True):
        assert (x.double() - e).abs().max() < 4 * torch.finfo(dtype).eps * e.abs().max()


@pytest.mark.parametrize("shape, strides", [((1, 4, 5), (7, 2**31 // 3 + 1, 1)),
                                            ((4, 1, 5), (2**31 // 3 + 1, 7, 1))])
def test_offsets_beyond_int32(shape, strides):
    """Inputs, then images, 1.4 GB apart: 3 * stride > 2^31. The memory between is never touched."""
    far = torch.empty(2**31 + 9, dtype=torch.float16, device=DEVICE).as_strided(shape, strides)
    q, k, v = slots(shape[0], 3, shape[1], 5, dtype=torch.float16)
    three_way([q, far.copy_(k), v])
    three_way([q, k, far.copy_(v)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("i", range(3))
def test_bad_input_shows(bad, i):
    inputs = slots(1, 5, 34, 4)
    inputs[i][0, 3, 2] = bad
    with warnings.catch_warnings(action="ignore"):
        assert not kernel(*inputs).isfinite().all()


def test_gradient_scales_with_the_incoming_one():
    inputs = slots(2, 5, 34, 7, dtype=torch.float16)
    for go in 0., -2., 1024.:
        three_way(inputs, [go * randn(2, 5, 7)])


@pytest.mark.parametrize("i", [0, 1])
def test_gradient_of_one_output(i):
    """A loss of u alone, though a was asked for, or of a alone."""
    inputs = slots(2, 5, 34, 7)
    three_way([*inputs], [0. * randn(2, 5, 7) if i else randn(2, 5, 7), randn(2, 5, 34) * i], maps=True)
    for got, want in zip(*(torch.autograd.grad(f(*leaves, maps=True)[i].square().sum(), leaves[:3 - i])
                           for f in (kernel, slot_attention_reference)
                           for leaves in [[x.detach().requires_grad_() for x in inputs]]), strict=True):
        close(got, want)


# ---- the operator

def test_views_of_one_projection():
    """k and v are halves of one matmul's output: read where they lie, and the gradient comes back whole."""
    q, kv, copied, copy = randn(2, 5, 7), randn(2, 34, 14, seed=1), [], torch.Tensor.contiguous
    f, g = (lambda q, kv, f=f: f(q, *kv.chunk(2, 2)) for f in (kernel, slot_attention_reference))
    with mock.patch.object(torch.Tensor, "contiguous", lambda x: (copied.append(x.shape), copy(x))[1]):
        kernel(q, *kv.chunk(2, 2))
        assert (2, 34, 7) not in copied
        kernel(q, *layout(kv, "transposed").chunk(2, 2))
        assert copied.count((2, 34, 7)) == 2
    compare(f, g, [q, kv], go=[randn(2, 5, 7, seed=3)])


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, maps):
    q, k, v = (x.requires_grad_() for x in slots(2, 3, 17, 5, dtype=torch.float32))
    m = list(masks(2, 3, 17, 0).values()) if masked else [None, None]
    u, den, a = (x.detach() for x in module._forward(q, k, v, *m, 1e-8, .4, maps))
    torch.library.opcheck(module._forward, (q, k, v, *m, 1e-8, .4, maps))
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(module._backward, (u + 1, a + 1, q, k, v, *m, u, den, 1e-8, .4))


def test_compiles_without_a_break():
    q, k, v = slots(2, 5, 34, 7, dtype=torch.float32)
    m = masks(2, 5, 34, 0)
    harness.check_compiles(lambda q, k, v: kernel(q.tanh(), k, v, maps=True, **m), q, k, v)


def test_deterministic():
    harness.check_deterministic(partial(kernel, maps=True), *slots(2, 7, 70, 33, dtype=torch.float16))


def test_the_work_can_be_divided_at_will():
    inputs = slots(3, 7, 133, 5)
    want = run(kernel, inputs)
    for programs, BN in (1, 32), (3, 128), (9, 16), (512, 64):    # 1, 1, 3, 3 programs an image
        with mock.patch.object(module, "PROGRAMS", programs), tiles(BN):
            for x, y in zip(run(kernel, inputs), want, strict=True):
                close(x, y)


def test_zero_stride_gradient():
    harness.check_zero_stride_grad(kernel, *slots(2, 5, 34, 7, dtype=torch.float32))
    q, k, v = (x.requires_grad_() for x in slots(1, 2, 3, 4))
    u, a = kernel(q, k, v, maps=True)
    for x in u, a:
        close(torch.autograd.grad(x, (q, k), x.new_ones(()).expand_as(x), retain_graph=True),
              torch.autograd.grad(x, (q, k), torch.ones_like(x), retain_graph=True))


def test_backward_inside_autocast():
    f, operators = partial(slot_attention, maps=True), (module._forward, module._backward)
    harness.check_backward_inside_autocast(f, operators, *slots(2, 5, 34, 7, dtype=torch.float32))


def test_double_backward():
    inputs = slots(1, 2, 3, 4)
    harness.check_no_double_backward(partial(kernel, maps=True), *inputs)
    f = partial(slot_attention, eps=.1, maps=True, impl="reference")
    assert torch.autograd.gradgradcheck(f, [x.requires_grad_() for x in inputs])


def test_saves_nothing_of_size_slots_by_inputs():
    kept = []
    q, k, v = (x.requires_grad_() for x in slots(2, 5, 70, 7))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel(q, k, v, **masks(2, 5, 70, 0))
        assert sorted(t.numel() for t in kept) == [2 * 5, 2 * 5, 70, 70, 2 * 70, 2 * 70 * 7, 2 * 70 * 7]
        kept.clear()
        with torch.no_grad():
            assert kernel(q, k, v).grad_fn is None
        assert not kept


def test_gradients_of_some_inputs():
    inputs = slots(2, 5, 34, 7)
    want = run(kernel, inputs)[1:]
    for i in range(3):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        assert torch.autograd.grad(kernel(*leaves).sum(), leaves[i])[0].equal(want[i])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, impl):
    """Inputs are rounded to the type of autocast, and u has it; a and gradients keep fp32, fp64 is let be."""
    inputs = slots(2, 5, 34, 7, dtype=torch.float32)
    f = partial(slot_attention, maps=True, impl=impl)
    want = run(f, [x.to(low) for x in inputs])
    with torch.autocast(DEVICE, low):
        got = run(f, inputs)
        assert [t.dtype for t in got] == [low] + [torch.float32] * 4
        assert all(x.equal(y.to(x.dtype)) for x, y in zip(got, want, strict=True))
        assert f(*slots(1, 2, 3, 4))[0].dtype == torch.float64


@pytest.mark.parametrize("S, D, dtype", [(129, 4, torch.float32), (16, 513, torch.float16),
                                         (17, 129, torch.float32), (65, 65, torch.bfloat16),
                                         (17, 65, torch.float64)])
def test_beyond_the_tiles(S, D, dtype):
    """"triton" says so, "auto" is the reference; one slot or column less and the kernel runs."""
    q, k, v = slots(1, S, 3, D, dtype=dtype)
    with pytest.raises(ValueError, match=f"hold {S} slots of {D} numbers"):
        kernel(q, k, v)
    assert slot_attention(q, k, v).equal(slot_attention_reference(q, k, v))
    less = (slice(None), slice(S - (D == 4)), slice(D - (D > 4)))
    three_way([q[less], k[:, :, less[2]], v[:, :, less[2]]])


@pytest.mark.parametrize("q, k, v", [
    ((5, 3), (1, 9, 3), (1, 9, 3)), ((1, 5, 3), (1, 9, 4), (1, 9, 4)), ((2, 5, 3), (1, 9, 3), (1, 9, 3)),
    ((1, 5, 3), (1, 9, 3), (1, 8, 3)), ((1, 5, 3), (1, 9, 3, 1), (1, 9, 3, 1)),
    ((0, 5, 3), (0, 9, 3), (0, 9, 3)), ((1, 0, 3), (1, 9, 3), (1, 9, 3)), ((1, 5, 3), (1, 0, 3), (1, 0, 3)),
    ((1, 5, 0), (1, 9, 0), (1, 9, 0)),
])
def test_shapes_that_are_wrong(q, k, v):
    with pytest.raises(ValueError, match=re.escape(", ".join(f"{list(x)} torch.float32" for x in (q, k, v)))):
        slot_attention(*(torch.zeros(shape) for shape in (q, k, v)))


@pytest.mark.parametrize("options, words", [
    (dict(mask=torch.zeros(1, 5, dtype=torch.bool)), r"\[1, 5\] torch.bool"),
    (dict(slot_mask=torch.zeros(1, 9, dtype=torch.bool)), r"\[1, 9\] torch.bool"),
    (dict(slot_mask=torch.zeros(1, 5)), r"\[1, 5\] torch.float32$"), (dict(eps=-1e-8), "eps"),
    (dict(eps=torch.tensor(.1)), "unless"), (dict(scale=torch.tensor(1.)), "unless"),
    (dict(eps=1.1), "eps"), (dict(eps=math.nan), "eps"), (dict(scale=0.), "scale"),
    (dict(scale=-1.), "scale"),
    (dict(scale=math.nan), "scale"), (dict(impl="cuda"), "'cuda'"),
])
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        slot_attention(torch.zeros(1, 5, 3), torch.zeros(1, 9, 3), torch.zeros(1, 9, 3), **options)


def test_types_must_agree():
    q, k, v = slots(1, 2, 3, 4)
    for inputs in (q.float(), k, v), (q, k.float(), v), (q, k, v.float()):
        with pytest.raises(ValueError, match="float32"):
            slot_attention(*inputs)


def test_triton_where_it_cannot_run():
    q, k = torch.zeros(1, 5, 3, device="meta"), torch.zeros(1, 9, 3, device="meta")
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        kernel(q, k, k)
    assert [x.shape for x in slot_attention(q, k, k, maps=True)] == [(1, 5, 3), (1, 5, 9)]


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, slot_attention
q, k = torch.eye(2)[None].requires_grad_(), torch.eye(2)[None]
u = slot_attention.slot_attention(q, k, k, scale=1., eps=0.)
print(u[0, 0, 0].item())
u[0, 0, 0].backward()
print(q.grad[0, 0, 0].item())
try: slot_attention.slot_attention(q, k, k, impl="triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "slot_attention.py").write_text(Path(module.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    u, dq, message = out.stdout.splitlines()
    p = 1 / (1 + math.exp(-1))                                    # a_11, and u_11 = a_11 / (a_11 + a_12)
    assert float(u) == pytest.approx(p, rel=1e-6) and float(dq) == pytest.approx(p * (1 - p)**2, rel=1e-5)
    assert "cannot run on cpu" in message and why in message
