"""CLIP's loss: the kernel against its definition, against the formula in loops, and by its symmetries."""
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

from kernels import clip
from kernels.clip import clip_loss, clip_loss_reference

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
TILES = [dict(BM=16, BN=32, BD=16), dict(BM=32, BN=16, BD=64), dict(BM=32, BN=64, BD=32)]
ROWS = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 67])      # N
WIDTHS = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 34, 65])    # D
SHARES = st.sampled_from([(256, 2**27), (1, 2**9), (2, 1), (5, 2**11)])           # PROGRAMS, CHUNK
SHARP = st.sampled_from([1., 3., 10., 100.])                      # scale
SEEDS, LAYOUT = st.integers(0, 2**16), st.sampled_from(LAYOUTS)


def tiles(t, share=(256, 2**27)):
    """Run with this tile, whatever the table says, these programs at a time and these elements of G."""
    def table(D, itemsize, shared, backward):
        return t | dict(num_warps=4, num_stages=1)
    return mock.patch.multiple(clip, _tiles=table, PROGRAMS=share[0], CHUNK=share[1])


def unit(n, D, seed=0):
    return F.normalize(randn(n, D, seed=seed))


def learnable(scale, dtype=torch.float64):
    return torch.tensor(scale, dtype=dtype, device=DEVICE)


def three_way(a, b, scale, go=None):
    """The terms of da are G_ik b_k scale / 2N, |G| <= 2. dscale is the difference of two sums of P c, each as
    large as c, and P is as good as lse, which is log2 N or more."""
    c, n = (a.double() @ b.double().T).abs().max().item(), len(a)
    s = scale.item() if torch.is_tensor(scale) else scale
    da, db = (s * x.abs().max().item() / n for x in (b, a))
    largest = [max(c * s, math.log(n)), da, db, c * max(1, math.log2(n))]
    if torch.is_tensor(scale):
        compare(clip_loss, clip_loss_reference, [a, b, scale], largest, go)
    else:
        compare(partial(clip_loss, scale=s), partial(clip_loss_reference, scale=s), [a, b], largest, go)


def paper(a, b, scale):
    """Both cross-entropies in loops over numbers, as in Fig. 3."""
    a, b, n = a.tolist(), b.tolist(), len(a)
    s = [[scale * sum(x * y for x, y in zip(u, v, strict=True)) for v in b] for u in a]
    rows = sum(math.log(sum(math.exp(s[i][k] - s[i][i]) for k in range(n))) for i in range(n))
    columns = sum(math.log(sum(math.exp(s[i][k] - s[k][k]) for i in range(n))) for k in range(n))
    return (rows + columns) / (2 * n)


# ---- against the definition

@settings(max_examples=24)
@given(ROWS, WIDTHS, SHARP, SEEDS, LAYOUT, LAYOUT, st.sampled_from(TILES), SHARES)
def test_float64(n, D, scale, seed, kind_a, kind_b, tile, share):
    with tiles(tile, share):
        three_way(layout(unit(n, D, seed), kind_a), layout(unit(n, D, seed + 1), kind_b), learnable(scale))


@settings(max_examples=40)
@given(ROWS, WIDTHS, SHARP, SEEDS, st.sampled_from(SCALES), LAYOUT, st.sampled_from(TILES), SHARES,
       st.sampled_from(LOW))
def test_three_way(n, D, scale, seed, length, kind, tile, share, dtype):
    a, b = (layout((length * unit(n, D, seed + i)).to(dtype), kind) for i in range(2))
    scale = learnable(scale / max(1, length)**2, torch.float32)   # beyond, logits are noise in fp32
    with tiles(tile, share):
        three_way(a, b, scale)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_tiles_of_the_table(dtype):
    for n, D in [(70, 130), *[(700, 260)] * (DEVICE == "cuda")]:
        three_way(unit(n, D).to(dtype), unit(n, D, 1).to(dtype), 10.)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_operators_without_kernel(dtype):
    off = partial(clip._forward.set_kernel_enabled, DEVICE, enabled=False)
    with off(), clip._backward.set_kernel_enabled(DEVICE, enabled=False):
        with mock.patch.object(clip, "_plan", side_effect=AssertionError("the kernel ran")):
            scale = learnable(10., torch.promote_types(dtype, torch.float32))
            three_way(layout(unit(34, 17).to(dtype), "transposed"), unit(34, 17, 1).to(dtype), scale)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("n, D, scale", [(1, 3, 2.), (3, 1, 5.), (5, 4, 3.)])
def test_paper_formula(n, D, scale, impl):
    values = [unit(n, D, n), unit(n, D, n + 1), learnable(scale)]
    loss, *grads = run(partial(clip_loss, impl=impl), values)
    assert loss.item() == pytest.approx(paper(*values), rel=1e-12, abs=1e-14)
    h = 1e-5
    for j, i in [(0, 0), (0, -1), (1, 0), (1, -1), (2, 0)]:       # central differences, without autograd
        ends = []
        for step in h, -h:
            moved = [v.clone() for v in values]
            moved[j].view(-1)[i] += step
            ends.append(paper(*moved))
        assert grads[j].view(-1)[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-8)


# ---- values known by hand

def test_one_pair():
    """N=1: nothing to choose from, so loss and gradients are 0, not nearly 0."""
    for dtype in [*LOW, torch.float64]:
        values = [unit(1, 5).to(dtype), unit(1, 5, 1).to(dtype), learnable(10.)]
        assert not any(x.any() for x in run(clip_loss, values))


@pytest.mark.parametrize("n", [2, 5, 37])
def test_pairs_on_orthogonal_axes(n):
    """log(1 + (N-1) e^-scale), of rows as of columns; G = 2 (P - I), so da = db = scale G / 2N."""
    scale, eye = 3., torch.eye(n, dtype=torch.float64, device=DEVICE)
    loss, da, db, dscale = run(clip_loss, [eye, eye.clone(), learnable(scale)])
    rest = (n - 1) * math.exp(-scale)
    assert loss.item() == pytest.approx(math.log(1 + rest), rel=1e-14)
    assert dscale.item() == pytest.approx(-rest / (1 + rest), rel=1e-13)
    p = ((scale * eye).exp() / (math.exp(scale) + n - 1) - eye) * scale / n
    torch.testing.assert_close(da, p, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(db, p, rtol=1e-12, atol=1e-15)


def test_rows_and_columns_differ():
    """S = (s 0; s 0): rows lose log(1 + e^-s) and log(1 + e^s), columns, of equal logits, log 2."""
    s, b = 2., torch.eye(2, dtype=torch.float64, device=DEVICE)
    loss = clip_loss(b[:1].expand(2, 2), b, s).item()
    rows = math.log(1 + math.exp(-s)) + math.log(1 + math.exp(s))
    assert loss == pytest.approx((rows + 2 * math.log(2)) / 4, rel=1e-14)


@pytest.mark.parametrize("scale", [0., 1., 100.])
def test_collapsed(scale):
    """All rows equal, or scale 0: the loss is log N, and at scale 0 its slope is mean(c) - mean(c_ii)."""
    a, b = unit(37, 5), unit(37, 5, 1)
    loss, da, db, dscale = run(clip_loss, [a, b, learnable(0.)])
    c = a @ b.T
    assert loss.item() == pytest.approx(math.log(37), rel=1e-14)
    assert da.abs().max() < 1e-25 and db.abs().max() < 1e-25
    assert dscale.item() == pytest.approx((c.mean() - c.diagonal().mean()).item(), rel=1e-12)
    loss = clip_loss(a[:1].expand(37, 5), a[:1].expand(37, 5), learnable(scale)).item()
    assert loss == pytest.approx(math.log(37), rel=1e-14)


# ---- symmetries

@settings(max_examples=10)
@given(st.integers(1, 40), st.sampled_from([3, 17, 33]), SEEDS)
def test_symmetries(n, D, seed):
    values = a, b, scale = unit(n, D, seed), unit(n, D, seed + 1), learnable(5.)
    loss, da, db, dscale = run(clip_loss, values)
    close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)

    def check(a, b, scale, *want):
        for found, x in zip(run(clip_loss, [a, b, scale]), want, strict=True):
            close(found, x)

    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(randn(D, D, seed=seed))[0]
    check(b, a, scale, loss, db, da, dscale)                          # text and image swapped
    check(a[order], b[order], scale, loss, da[order], db[order], dscale)
    check(a @ turn, b @ turn, scale, loss, da @ turn, db @ turn, dscale)
    check(2 * a, 3 * b, scale / 6, loss, da / 2, db / 3, 6 * dscale)
    close((a * da).sum(), scale * dscale)                             # a, b and scale stretch the same logits
    close((b * db).sum(), scale * dscale)
    close(a.T @ da + b.T @ db, (a.T @ da + b.T @ db).T)               # no torque: rotation, infinitesimally


# ---- extremes

@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("make", [
    lambda: (unit(70, 33)[:1].expand(70, 33), unit(70, 33)[:1].expand(70, 33)),           # every logit 100
    lambda: (unit(40, 64), unit(40, 64)),                             # aligned: P of the pair is nearly 1
    lambda: (unit(40, 64), -unit(40, 64)),                            # its own text is the worst of all
    lambda: (unit(34, 5), torch.zeros(34, 5, dtype=torch.float64, device=DEVICE)),
], ids=["equal", "aligned", "opposite", "zero"])
def test_sharp(make, dtype):
    a, b = (x.to(dtype) for x in make())
    three_way(a, b, learnable(100., torch.float32))


@pytest.mark.parametrize("dtype, tau, rtol", [(torch.float16, .06, 1e-3), (torch.float16, .1, 1e-3),
                                              (torch.bfloat16, .1, 8e-3)])
def test_confident(dtype, tau, rtol):
    """Orthogonal pairs, sure of each other: P - 1, -3e-3 at tau = .1, is precise, P in this type is not;
    so are the other P, 6e-8 at tau = .06, a step of fp16."""
    n, go = 64, 2.**16
    a = torch.eye(n, dtype=dtype, device=DEVICE)
    da = run(partial(clip_loss, scale=1 / tau), [a, a.clone()], go)[1].double()
    off, on = da[a == 0], da.diagonal()
    p = go / (n * tau) / (math.exp(1 / tau) + n - 1)
    torch.testing.assert_close(off, torch.full_like(off, p), rtol=rtol, atol=0)
    if tau == .1:
        torch.testing.assert_close(on, torch.full_like(on, (1 - n) * p), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_no_bias(dtype):
    """To the nearest, so errors cancel in the sum; cutting bits off would lose half an ulp of it."""
    values = [unit(70, 64).to(dtype), unit(70, 64, 1).to(dtype)]
    exact = run(partial(clip_loss_reference, scale=10.), [v.double() for v in values])
    for found, e in zip(run(partial(clip_loss, scale=10.), values)[1:], exact[1:], strict=True):
        assert ((found.double() - e) * e.sign()).sum().abs() < torch.finfo(dtype).eps / 20 * e.abs().sum()


@pytest.mark.parametrize("which", [0, 1])
def test_offsets_beyond_int32(which):
    """Four rows 1.4 GB apart: 3 * stride > 2^31. The memory between is never touched."""
    values = [unit(4, 5).half(), unit(4, 5, 1).half()]
    far = torch.empty(2**31 + 9, dtype=torch.float16, device=DEVICE)
    values[which] = far.as_strided((4, 5), (2**31 // 3 + 1, 1)).copy_(values[which])
    three_way(*values, 10.)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_bad_input_shows(bad, which):
    values = [unit(34, 5), unit(34, 5, 1)]
    values[which][20, 3] = bad
    with warnings.catch_warnings(action="ignore"):
        assert not clip_loss(*values, 10.).isfinite()


def test_gradient_scales_with_the_incoming_one():
    for go in [0., -2., 1024.]:
        three_way(unit(34, 17).half(), unit(34, 17, 1).half(), learnable(10., torch.float32), go=go)


# ---- the operator

def test_opcheck():
    a, b, scale = unit(6, 5).float(), unit(6, 5, 1).float(), learnable(10., torch.float32)
    _, lse = clip._forward(a, b, scale)
    for both in True, False:
        torch.library.opcheck(clip._backward, (a, b, scale, lse, both))
    torch.library.opcheck(clip._forward, tuple(x.requires_grad_() for x in (a, b, scale)))


def test_compiles_without_a_break():
    def loss(a, b, log):
        return clip_loss(F.normalize(a), F.normalize(b), log.exp())
    harness.check_compiles(loss, unit(34, 17).float(), unit(34, 17, 1).float(), learnable(2., torch.float32))


def test_deterministic():
    with tiles(TILES[0], (2, 2**9)):
        harness.check_deterministic(clip_loss, unit(70, 33).half(), unit(70, 33, 1).half(), learnable(10.))


def test_backward_inside_autocast():
    values = [x.float() for x in (unit(34, 17), unit(34, 17, 1), torch.tensor(20., device=DEVICE))]
    harness.check_backward_inside_autocast(clip_loss, (clip._forward, clip._backward), *values)


def test_double_backward():
    values = unit(6, 5), unit(6, 5, 1), learnable(3.)
    harness.check_no_double_backward(clip_loss, *values)
    values = [v.requires_grad_() for v in values]
    assert torch.autograd.gradgradcheck(partial(clip_loss, impl="reference"), values)


def test_saves_only_what_it_was_given_and_lse():
    kept = []
    a, b, scale = unit(70, 5).requires_grad_(), unit(70, 5, 1).requires_grad_(), learnable(3.)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        clip_loss(a, b, scale)
        assert sorted(kept) == [1, 4 * 70, 70 * 5, 70 * 5]
        kept.clear()
        with torch.no_grad():
            assert clip_loss(a, b, scale).grad_fn is None
        assert not kept


def test_memory_is_linear():
    """Nothing as large as S: of G a chunk, of the columns' partial sums two blocks at a time."""
    sizes, empty = [], torch.empty

    def record(*shape, **options):
        sizes.append(math.prod(empty(*shape, device="meta").shape))
        return empty(*shape, **options)

    values = unit(150, 8), unit(150, 8, 1)
    with tiles(dict(BM=16, BN=32, BD=16), (2, 16 * 150)), mock.patch("torch.empty", record):
        three_way(*values, 10.)
    assert max(sizes) == 16 * 150


@pytest.mark.parametrize("trained", [0, 1])
def test_a_frozen_tower_costs_no_gemm(trained):
    """One of a and b has a gradient (LiT): G b alone, whichever it is. Both: two GEMMs a chunk."""
    values = [unit(34, 17), unit(34, 17, 1)]
    want = run(partial(clip_loss_reference, scale=10.), values)[1 + trained]
    values[trained].requires_grad_()
    with mock.patch.object(clip, "_matmul", side_effect=clip._matmul) as gemm:
        clip_loss(*values, 10.).backward()
        assert gemm.call_count == 1
        run(partial(clip_loss, scale=10.), values)
        assert gemm.call_count == 3
    torch.testing.assert_close(values[trained].grad, want, rtol=1e-12, atol=1e-15)
    assert values[1 - trained].grad is None


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, impl):
    """a and b are rounded to the type of autocast, loss and gradients keep theirs; fp64 is left alone."""
    values = [unit(34, 17), unit(34, 17, 1)]
    f = partial(clip_loss, scale=10., impl=impl)
    want = run(f, [v.float().to(low) for v in values])
    with torch.autocast(DEVICE, low):
        got = run(f, [v.float() for v in values])
        assert [t.dtype for t in got] == [torch.float32] * 3
        assert all(x.equal(y.float()) for x, y in zip(got, want, strict=True))
        assert f(values[0].float(), values[1].to(low)).equal(got[0])
        assert f(*values).dtype == torch.float64


@pytest.mark.parametrize("a, b, scale, impl, words", [
    ((5, 3), (4, 3), 1., "auto", r"\[5, 3\] torch.float32 and \[4, 3\]"), ((5, 3), (5, 4), 1., "auto", "N,D"),
    ((4,), (4,), 1., "auto", r"\[4\]"), ((2, 2, 3), (2, 2, 3), 1., "auto", "N,D"),
    ((0, 3), (0, 3), 1., "auto", "N, D >= 1"), ((4, 0), (4, 0), 1., "reference", "N, D >= 1"),
    ((4, 3), (4, 3), 0., "auto", "positive"), ((4, 3), (4, 3), -1., "reference", "positive"),
    ((4, 3), (4, 3), math.nan, "auto", "positive"), ((4, 3), (4, 3), torch.ones(1), "auto", "0-d"),
    ((4, 3), (4, 3), 1., "cuda", "'cuda'"),
])
def test_errors(a, b, scale, impl, words):
    with pytest.raises(ValueError, match=words):
        clip_loss(torch.zeros(a, device=DEVICE), torch.zeros(b, device=DEVICE), scale, impl)


def test_dtypes_must_agree():
    with pytest.raises(ValueError, match="one dtype and device, got .* torch.float32 and .* torch.float16"):
        clip_loss(unit(4, 3).float(), unit(4, 3).half(), 1.)
    with pytest.raises(ValueError, match="one dtype and device, got .* meta"):
        clip_loss(unit(4, 3), unit(4, 3).to("meta"), 1.)


def test_triton_where_it_cannot_run():
    a = torch.zeros(4, 3, device="meta")
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        clip_loss(a, a, 1., "triton")
    assert clip_loss(a, a, 1.).shape == ()


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, clip
a, b, scale = (torch.tensor(x, requires_grad=True) for x in ([[1., 0.], [0., 1.]], [[1., 0.], [0., 1.]], 2.))
print(clip.clip_loss(a, b, scale).item())
clip.clip_loss(a, b, scale).backward()
print(scale.grad.item())
try: clip.clip_loss(a, b, 2., "triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "clip.py").write_text(Path(clip.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    loss, slope, message = out.stdout.splitlines()
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    assert float(slope) == pytest.approx(-1 / (1 + math.exp(2)), rel=1e-6)
    assert "cannot run on cpu" in message and why in message
