"""NT-Xent: the kernel against its definition, against the formula in plain loops, and by its symmetries."""
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

from kernels import contrastive
from kernels.contrastive import nt_xent, nt_xent_reference

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
TILES = [dict(BM=16, BN=32, BD=16, BO=64), dict(BM=32, BN=16, BD=64, BO=32), dict(BM=32, BN=64, BD=32, BO=16)]
ROWS = st.sampled_from([2, 4, 6, 14, 30, 32, 34, 66, 70])         # 2N
WIDTHS = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 67])    # D
TAUS = st.sampled_from([.01, .1, .5, 1.])
SEEDS = st.integers(0, 2**16)


def tiles(t):
    """Run with this tile, whatever the table says."""
    def plan(n, D, itemsize, shared, backward):
        return {k: v for k, v in t.items() if backward or k != "BO"} | dict(num_warps=4, num_stages=1)
    return mock.patch.object(contrastive, "_tiles", plan)


def unit(n, D, seed=0):
    return F.normalize(randn(n, D, seed=seed))


def terms(z, tau):
    """The largest of the logits, and of the terms G_ik z_k / (2N tau) that make up the gradient: |G| <= 2."""
    z = z.double()
    return (z @ z.T).abs().max().item() / tau, 2 * z.abs().max().item() / (len(z) * tau)


def three_way(z, tau, kernel=nt_xent, go=None):
    compare(partial(kernel, tau=tau), partial(nt_xent_reference, tau=tau), [z], terms(z, tau), go)


def paper(z, tau):
    """Eq. 1 in loops over numbers, averaged over all positive pairs, both (i,j) and (j,i)."""
    z, N = z.tolist(), len(z) // 2

    def sim(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True))

    def ell(i, j):
        total = sum(math.exp(sim(z[i], z[k]) / tau) for k in range(2 * N) if k != i)
        return -math.log(math.exp(sim(z[i], z[j]) / tau) / total)

    return sum(ell(k, k + N) + ell(k + N, k) for k in range(N)) / (2 * N)


# ---- against the definition

@settings(max_examples=40)
@given(ROWS, WIDTHS, TAUS, SEEDS, st.sampled_from(LAYOUTS), st.sampled_from(TILES))
def test_float64(n, D, tau, seed, kind, tile):
    with tiles(tile):
        three_way(layout(unit(n, D, seed), kind), tau)


@settings(max_examples=50)
@given(ROWS, WIDTHS, TAUS, SEEDS, st.sampled_from(SCALES), st.sampled_from(LAYOUTS), st.sampled_from(TILES),
       st.sampled_from(LOW))
def test_three_way(n, D, tau, seed, scale, kind, tile, dtype):
    z = layout((scale * unit(n, D, seed)).to(dtype), kind)
    with tiles(tile):
        three_way(z, tau * max(1, scale)**2)                      # beyond, logits are noise in fp32


@pytest.mark.parametrize("n, D", [(70, 130), (300, 260)] if DEVICE == "cuda" else [(70, 130)])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_tiles_of_the_table(n, D, dtype):
    three_way(unit(n, D).to(dtype), .1)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_operators_without_kernel(dtype):
    off = partial(contrastive._forward.set_kernel_enabled, DEVICE, enabled=False)
    with off(), contrastive._backward.set_kernel_enabled(DEVICE, enabled=False):
        with mock.patch.object(contrastive, "_plan", side_effect=AssertionError("the kernel ran")):
            three_way(layout(unit(34, 17).to(dtype), "transposed"), .1)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_operators_without_kernel_stay_fp32_under_autocast(low):
    z, f = unit(34, 17).to(low), partial(nt_xent, tau=.1)
    with contrastive._forward.set_kernel_enabled(DEVICE, enabled=False):
        loss = f(z)
        with torch.autocast(DEVICE, low):
            assert f(z).equal(loss) and f(z.float()).equal(loss)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("n, D, tau", [(2, 3, .5), (6, 1, .1), (10, 4, .3)])
def test_paper_formula(n, D, tau, impl):
    z = unit(n, D, seed=n)
    loss, dz = run(partial(nt_xent, tau=tau, impl=impl), [z])
    assert loss.item() == pytest.approx(paper(z, tau), rel=1e-12, abs=1e-14)
    h = 1e-5
    for i, d in [(0, 0), (n // 2, D - 1), (n - 1, 0)]:            # central differences, without autograd
        step = torch.zeros_like(z)
        step[i, d] = h
        slope = (paper(z + step, tau) - paper(z - step, tau)) / (2 * h)
        assert dz[i, d].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


# ---- values known by hand

def test_one_image():
    """N=1: the only other row is the positive one, so loss and gradient are 0, not nearly 0."""
    for dtype in [*LOW, torch.float64]:
        loss, dz = run(partial(nt_xent, tau=.1), [unit(2, 5).to(dtype)])
        assert loss == 0 and not dz.any()


def test_two_images_on_orthogonal_axes():
    """Rows e1 e2 e1 e2: each row has its twin at similarity 1 and the two others at 0."""
    tau, z = .5, torch.eye(2, dtype=torch.float64, device=DEVICE).repeat(2, 1)
    loss, dz = run(partial(nt_xent, tau=tau), [z])
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-1 / tau)), rel=1e-14)
    p = math.exp(1 / tau) / (math.exp(1 / tau) + 2)               # P of the twin, (1 - p) / 2 of the others
    want = 2 * torch.tensor([[p - 1, 1 - p], [1 - p, p - 1]]).repeat(2, 1) / (4 * tau)
    torch.testing.assert_close(dz.cpu(), want.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("N", [5, 19])
def test_aligned_and_collapsed(N):
    """Both views equal and the images orthogonal: log(1 + (2N-2) e^(-1/tau)). All rows equal: log(2N-1)."""
    tau, z = .3, torch.eye(N, dtype=torch.float64, device=DEVICE).repeat(2, 1)
    assert nt_xent(z, tau).item() == pytest.approx(math.log(1 + (2 * N - 2) * math.exp(-1 / tau)), rel=1e-14)
    assert nt_xent(z[:1].expand_as(z), tau).item() == pytest.approx(math.log(2 * N - 1), rel=1e-14)


def test_before_training():
    """Isotropic rows: log(2N-1) + Var(s)/2, and the cosine of two random directions has variance 1/D."""
    N, D, tau = 256, 128, .5
    with tiles(dict(BM=128, BN=128, BD=128, BO=128)):
        loss = sum(nt_xent(unit(2 * N, D, seed).float(), tau).item() for seed in range(4)) / 4
    assert loss == pytest.approx(math.log(2 * N - 1) + 1 / (2 * D * tau**2), abs=.013)


# ---- symmetries

@settings(max_examples=10)
@given(st.integers(1, 24), st.sampled_from([3, 17, 33]), SEEDS)
def test_symmetries(N, D, seed):
    z, f = unit(2 * N, D, seed), partial(nt_xent, tau=.2)
    loss, dz = run(f, [z])
    close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)

    def check(rows=slice(None), turn=1., c=1.):
        turn = turn if torch.is_tensor(turn) else torch.eye(D, dtype=z.dtype, device=DEVICE)
        other, grad = run(partial(nt_xent, tau=.2 * c * c), [c * z[rows] @ turn])
        close(other, loss)
        close(c * grad, dz[rows] @ turn)

    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    check(rows=torch.arange(2 * N).roll(N))                           # views swapped
    check(rows=torch.cat([order, order + N]))                         # images permuted
    check(turn=torch.linalg.qr(randn(D, D, seed=seed))[0])            # all embeddings rotated
    check(c=3.)                                                       # longer embeddings, higher temperature
    close(z.T @ dz, (z.T @ dz).T)                                     # no torque: rotation, infinitesimally


@settings(max_examples=10)
@given(st.integers(2, 24), st.sampled_from([2, 17, 33]), SEEDS)
def test_gradient_through_the_normalisation(N, D, seed):
    """The length of h changes nothing, so dh is orthogonal to h, row by row, and shrinks as h grows."""
    h = randn(2 * N, D, seed=seed)
    dh, = run(lambda h: nt_xent(F.normalize(h), .2), [h])[1:]
    assert (dh * h).sum(1).abs().max() < 1e-13 * h.norm(dim=1).max() and dh.abs().max() > 1e-3
    longer = run(lambda h: nt_xent(F.normalize(h), .2), [4 * h])[1]
    torch.testing.assert_close(longer * 4, dh, rtol=1e-11, atol=1e-13)


# ---- extremes

@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("make", [
    lambda: unit(70, 33)[:1].expand(70, 33),                          # all equal: every logit 1/tau
    lambda: torch.cat([unit(2, 8)[:1], -unit(2, 8)[:1]]),             # the only positive is opposite
    lambda: unit(35, 64).repeat(2, 1),                                # aligned: P of the positive is nearly 1
    lambda: torch.cat([unit(35, 64), -unit(35, 64)]),                 # positives opposite
    lambda: torch.zeros(34, 5, dtype=torch.float64, device=DEVICE),
], ids=["equal", "pair", "aligned", "opposite", "zero"])
def test_sharp(make, dtype):
    three_way(make().to(dtype), .01)


def test_tiny_probabilities_in_fp16():
    """Orthogonal images, sure of their twins: every other P is 6e-8, one step of fp16, yet dz is precise."""
    N, tau, go = 64, .06, 2.**16
    z = torch.eye(N, dtype=torch.float16, device=DEVICE).repeat(2, 1)
    dz = run(partial(nt_xent, tau=tau), [z], go)[1].double()
    p = 1 / (math.exp(1 / tau) + 2 * N - 2)                       # G = 2p, and each axis has two images
    off = dz[z == 0]
    torch.testing.assert_close(off, torch.full_like(off, 4 * p * go / (2 * N * tau)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_no_bias(dtype):
    """To the nearest, so errors cancel in the sum; cutting bits off would lose half an ulp of it."""
    z = unit(70, 64).to(dtype)
    exact = run(partial(nt_xent_reference, tau=.1), [z.double()])[1]
    dz = run(partial(nt_xent, tau=.1), [z])[1].double()
    assert ((dz - exact) * exact.sign()).sum().abs() < torch.finfo(dtype).eps / 20 * exact.abs().sum()


def test_offsets_beyond_int32():
    """Four rows 1.4 GB apart: 3 * stride > 2^31. The memory between is never touched."""
    far = torch.empty(2**31 + 9, dtype=torch.float16, device=DEVICE)
    three_way(far.as_strided((4, 5), (2**31 // 3 + 1, 1)).copy_(unit(4, 5)), .1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_input_shows(bad):
    z = unit(34, 5)
    z[20, 3] = bad
    with warnings.catch_warnings(action="ignore"):
        assert not nt_xent(z, .1).isfinite()


def test_gradient_scales_with_the_incoming_one():
    for go in [0., -2., 1024.]:
        three_way(unit(34, 17).half(), .1, go=go)


# ---- the operator

def test_opcheck():
    z = unit(6, 5).float()
    _, lse = contrastive._forward(z, .1)
    torch.library.opcheck(contrastive._forward, (z.requires_grad_(), .1))
    torch.library.opcheck(contrastive._backward, (torch.ones((), device=DEVICE), z.detach(), lse, .1))


def test_compiles_without_a_break():
    harness.check_compiles(lambda h: nt_xent(F.normalize(h), .1), unit(34, 17).float())


def test_deterministic():
    harness.check_deterministic(partial(nt_xent, tau=.1), unit(70, 33).half())


def test_backward_inside_autocast():
    operators = contrastive._forward, contrastive._backward
    harness.check_backward_inside_autocast(partial(nt_xent, tau=.05), operators, unit(34, 17).float())


def test_double_backward():
    harness.check_no_double_backward(partial(nt_xent, tau=.1), unit(6, 5))
    z = unit(6, 5).requires_grad_()
    assert torch.autograd.gradgradcheck(partial(nt_xent, tau=.5, impl="reference"), z)


def test_saves_only_z_and_lse():
    kept = []
    z = unit(70, 5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        nt_xent(z, .1)
        assert sorted(kept) == [2 * 70, 70 * 5]
        kept.clear()
        with torch.no_grad():
            assert nt_xent(z, .1).grad_fn is None
        assert not kept


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, impl):
    """z is rounded to the type of autocast, the loss and dz keep theirs; fp64 is left alone."""
    z = unit(34, 17)
    f = partial(nt_xent, tau=.1, impl=impl)
    loss, dz = run(f, [z.float().to(low)])
    with torch.autocast(DEVICE, low):
        got = run(f, [z.float()])
        assert [t.dtype for t in got] == [torch.float32] * 2
        assert got[0].equal(loss) and got[1].equal(dz.float())
        assert nt_xent(z, .1, impl=impl).dtype == torch.float64


@pytest.mark.parametrize("shape, tau, impl, error, words", [
    ((5, 3), .1, "auto", ValueError, r"\[5, 3\]"), ((4,), .1, "auto", ValueError, r"\[4\]"),
    ((2, 2, 3), .1, "auto", ValueError, "2N"), ((0, 3), .1, "auto", ValueError, "N, D >= 1"),
    ((4, 0), .1, "reference", ValueError, "N, D >= 1"), ((4, 3), 0., "auto", ValueError, "positive"),
    ((4, 3), -1., "reference", ValueError, "positive"), ((4, 3), math.nan, "auto", ValueError, "positive"),
    ((4, 3), .1, "cuda", ValueError, "'cuda'"),
])
def test_errors(shape, tau, impl, error, words):
    with pytest.raises(error, match=words):
        nt_xent(torch.zeros(shape, device=DEVICE), tau, impl)


def test_a_temperature_that_learns_needs_the_definition():
    """The kernel would leave it without a gradient."""
    z, tau = unit(8, 3), torch.tensor(.5, device=DEVICE, requires_grad=True)
    for impl in "auto", "triton":
        with pytest.raises(ValueError, match="reference"):
            nt_xent(z, tau, impl)
    impl = "reference"
    nt_xent(z, tau, impl).backward()
    assert tau.grad.abs() > 0


def test_triton_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        nt_xent(torch.zeros(4, 3, device="meta"), .1, "triton")
    assert nt_xent(torch.zeros(4, 3, device="meta"), .1).shape == ()


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, contrastive
z = torch.eye(2).repeat(2, 1).requires_grad_()
print(contrastive.nt_xent(z, .5).item())
contrastive.nt_xent(z, .5).backward()
try: contrastive.nt_xent(z, .5, "triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "contrastive.py").write_text(Path(contrastive.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    loss, message = out.stdout.splitlines()
    assert float(loss) == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)
    assert "cannot run on cpu" in message and why in message
