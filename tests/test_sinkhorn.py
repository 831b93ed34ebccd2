"""Sinkhorn: the kernel against its definition, SwAV's loop on plain numbers, and one process against two."""
import math
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
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

import kernels.sinkhorn as kernel
from kernels.sinkhorn import sinkhorn, sinkhorn_reference

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 * inf or inf - inf in a kernel
TILES = [((16, 16), (16, 16)), ((8, 32), (16, 8)), ((16, 8), (8, 32)), ((32, 16), (32, 16))]  # columns, rows
SIZES = st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 37, 67])
EPS = st.sampled_from([.03, .05, .25, 1.])
SEEDS = st.integers(0, 2**16)
SPLITS = st.sampled_from([1, 9, 1024])
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def tiles(tile, programs=1024):
    """Run with this tile and this many programs, whatever the table says."""
    def table(K, columns):
        BM, BN = tile[0] if columns else tile[1]
        return dict(BM=BM, BN=BN, num_warps=4, num_stages=1)
    stack = ExitStack()
    stack.enter_context(mock.patch.object(kernel, "_tiles", table))
    stack.enter_context(mock.patch.object(kernel, "PROGRAMS", programs))
    return stack


def cosines(B, K, dim=16, seed=0):
    z, c = (F.normalize(randn(n, dim, seed=seed + n)) for n in (B, K))
    return z @ c.T


def terms(s, eps):
    """The exponent of a code is s / eps less logs of sums over B and over K. Rounding it, in the type of the
    sums, makes an error relative to the code, which is at most 1."""
    ulps = torch.finfo(torch.promote_types(s.dtype, torch.float32)).eps / torch.finfo(s.dtype).eps
    return [(s[s.isfinite()].abs().max().item() / eps + math.log(s.numel())) * ulps]


def three_way(s, eps=.05, n=3):
    f = partial(sinkhorn, eps=eps, iterations=n)
    compare(f, partial(f, impl="reference"), [s], terms(s, eps))


def swav(s, eps, n):
    """Exponentials, then prototypes and samples in turn, on numbers: Q has total 1, as in the paper."""
    q = [[math.exp(v / eps) for v in row] for row in s.tolist()]
    B, K = s.shape
    for _ in range(n):
        for k in range(K):
            total = sum(q[i][k] for i in range(B))
            for i in range(B):
                q[i][k] /= total * K
        for i in range(B):
            total = sum(q[i])
            q[i] = [v / (total * B) for v in q[i]]
    return torch.tensor([[B * v for v in row] for row in q], dtype=torch.float64, device=DEVICE)


# ---- against the definition

@settings(max_examples=25)
@given(SIZES, SIZES, EPS, st.integers(1, 4), SEEDS, st.sampled_from(LAYOUTS), st.sampled_from(TILES), SPLITS)
def test_float64(B, K, eps, n, seed, kind, tile, splits):
    with tiles(tile, splits):
        three_way(layout(randn(B, K, seed=seed), kind), eps, n)


@settings(max_examples=35)
@given(SIZES, SIZES, EPS, st.integers(1, 3), SEEDS, st.sampled_from(SCALES), st.sampled_from(LAYOUTS),
       st.sampled_from(TILES), SPLITS, st.sampled_from(LOW))
def test_three_way(B, K, eps, n, seed, scale, kind, tile, splits, dtype):
    with tiles(tile, splits):
        three_way(layout(randn(B, K, seed=seed, scale=scale, dtype=dtype), kind), eps, n)


@pytest.mark.parametrize("B, K", [(300, 130), (3, 4099)] + [(3000, 8200)] * (DEVICE == "cuda"))
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_tiles_of_the_table(B, K, dtype):
    three_way(randn(B, K, scale=.3, dtype=dtype))


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_operators_without_kernel(dtype, kind):
    with ExitStack() as stack:
        for op in kernel._columns, kernel._rows, kernel._codes:
            stack.enter_context(op.set_kernel_enabled(DEVICE, enabled=False))
        stack.enter_context(mock.patch.object(kernel, "_plan", side_effect=AssertionError("the kernel ran")))
        s = layout(randn(34, 17, dtype=dtype), kind)
        three_way(s)
        assert sinkhorn(s).is_contiguous() and not len(sinkhorn(s[:0]))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("B, K, n", [(1, 5, 3), (7, 1, 2), (19, 7, 1), (19, 7, 2), (19, 7, 3), (6, 23, 3)])
def test_loop_of_the_paper(B, K, n, impl):
    s = cosines(B, K)
    close(sinkhorn(s, .05, n, impl=impl), swav(s, .05, n))


@pytest.mark.parametrize("programs", [1, 3, 4, 7, 1000])
def test_splits(programs):
    """31 rows by tiles of 2: up to 16 splits, which are merged 16, 8, 4, 2, 1."""
    s = randn(31, 5, scale=.3)
    with tiles(((2, 8), (32, 8)), programs):
        three_way(s)


# ---- values known by hand

@pytest.mark.parametrize("n", [1, 3])
def test_uniform(n):
    """A term of the sample plus one of the prototype: nothing tells which goes where. So with one sample.
    Exponents reach 20; in three steps of fp32 2.5, for to round 20 may itself cost all of the bound."""
    small = torch.arange(5.)[:, None] / 32 - torch.arange(9.) / 64
    for dtype in [*LOW, torch.float64]:
        large = [8 * small] * ((dtype, n) != (torch.float32, 3))
        for s in [randn(1, 9), torch.zeros(5, 9), small, *large]:
            code = sinkhorn(s.to(DEVICE, dtype), .05, n)
            want = torch.full_like(code, 1 / 9)
            torch.testing.assert_close(code, want, rtol=8 * torch.finfo(dtype).eps, atol=0)
        assert sinkhorn(randn(37, 1, scale=3., dtype=dtype), .05, n).eq(1).all()


def test_two_by_two():
    """Logits [[x, 0], [0, 0]]. One step: p / (p + 1/2) where p = sigmoid(x). In the limit: sigmoid(x / 2)."""
    x = 3.
    s = torch.tensor([[.25 * x, 0], [0, 0]], dtype=torch.float64, device=DEVICE)
    p, q = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(-x / 2))
    one = s.new_tensor([[p / (p + .5), .5 / (p + .5)], [(1 - p) / (1.5 - p), .5 / (1.5 - p)]])
    close(sinkhorn(s, .25, 1), one)
    close(sinkhorn(s, .25, 40), s.new_tensor([[q, 1 - q], [1 - q, q]]))


@pytest.mark.parametrize("n", [1, 4])
def test_square_with_a_diagonal(n):
    """Balanced from the start: a softmax of rows, e^x / (e^x + K - 1) on the diagonal."""
    K, x, eps = 19, 3., .05
    p = math.exp(x) / (math.exp(x) + K - 1)
    eye = torch.eye(K, dtype=torch.float64, device=DEVICE)
    close(sinkhorn(eps * x * eye, eps, n), eye * p + (1 - eye) * (1 - p) / (K - 1))


# ---- symmetries and conservation

@settings(max_examples=8)
@given(st.sampled_from([1, 2, 13, 18]), st.sampled_from([1, 3, 7, 17]), st.integers(1, 3), SEEDS)
def test_symmetries(B, K, n, seed):
    s, f = cosines(B, K, seed=seed), partial(sinkhorn, eps=.1, iterations=n)
    code, g = f(s), torch.Generator().manual_seed(seed)
    row, col = torch.randperm(B, generator=g), torch.randperm(K, generator=g)
    with tiles(TILES[seed % len(TILES)]):
        close(f(s[row][:, col]), code[row][:, col])
        close(f(s + 7.5), code)                                   # all scores shifted
        close(f(s + randn(K, seed=seed)), code)                   # each prototype's scores shifted
        close(sinkhorn(4 * s, .4, n), code)
        close(f(torch.cat([s, s])), torch.cat([code, code]))      # every sample twice
        close(f(torch.cat([s, s], 1)), torch.cat([code, code], 1) / 2)            # every prototype twice


@settings(max_examples=10)
@given(st.sampled_from([2, 13, 37]), st.sampled_from([2, 17, 33]), st.integers(1, 4), SEEDS)
def test_only_rows_and_columns_are_scaled(B, K, n, seed):
    """Q = diag(u) exp(s / eps) diag(v): log Q - s / eps is a term of the row plus a term of the column."""
    s = cosines(B, K, seed=seed)
    rest = sinkhorn(s, .1, n).log() - s / .1
    close(rest - rest[:1] - rest[:, :1] + rest[0, 0], torch.zeros_like(s), atol=1e-11)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6),
                                          (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [.3, 500.])
def test_rows_sum_to_one(dtype, bound, scale):
    code = sinkhorn(randn(67, 33, scale=scale, dtype=dtype))
    assert (code.double().sum(1) - 1).abs().max() < bound and (code >= 0).all()


def test_columns_become_balanced():
    B, K = 37, 11
    s = randn(B, K, scale=.1)
    far = [(sinkhorn(s, .05, n).sum(0) - B / K).abs().max().item() for n in (1, 2, 4, 8, 30)]
    assert far == sorted(far, reverse=True) and far[0] > .3 and far[-1] < 1e-6


def test_a_start_from_the_maximum_of_rows_is_another_algorithm():
    """The popular cure of the overflow. A shift of all scores is a cure too, and changes nothing."""
    s, eps = cosines(64, 32), .04
    ours, popular = sinkhorn(s, eps), swav(s - s.amax(1, keepdim=True), eps, 3)
    close(ours, swav(s - s.max(), eps, 3))
    assert (ours - popular).abs().max() > .1 and ours.argmax(1).ne(popular.argmax(1)).any()


# ---- extremes

@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("largest", [400, 1e4])
@pytest.mark.parametrize("make", [torch.sign, lambda x: x / x.abs().max()], ids=["signs", "spread"])
def test_large_scores(largest, make, dtype):
    s = (largest * .05 * make(randn(37, 17, seed=3))).to(dtype)
    assert not (s.float() / .05).exp().sum(0).isfinite().all()    # the plain loop would overflow
    with tiles(TILES[0]):
        three_way(s)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("n", [1, 3])
def test_forbidden_prototypes(dtype, n):
    """-inf: a code of 0. Here the first tiles of a row and of a column have nothing else."""
    s = randn(37, 33, scale=.2, dtype=dtype)
    s[randn(37, 33, seed=1) > .5] = -math.inf
    s[:35, 3], s[5, :32], s[36, 3], s[5, 32] = -math.inf, -math.inf, 0, 0
    with tiles(TILES[1]):
        three_way(s, n=n)
        code = sinkhorn(s, .05, n)
    assert not code[s == -math.inf].any() and code[5, 32] == 1
    assert (code.double().sum(1) - 1).abs().max() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bad", ["nan", "inf", "row of -inf", "column of -inf"])
def test_bad_input_shows(bad):
    s, every = randn(34, 5), slice(None)
    s[every if "column" in bad else 20, every if "row" in bad else 3] = float(bad.split()[-1])
    with warnings.catch_warnings(action="ignore"):
        once, twice = (sinkhorn(s, .05, n).isnan() for n in (1, 2))
    assert twice.all() and once[20].all()
    assert "row" not in bad or not once[:20].any()                # the others cannot see it in one step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_has_no_bias(dtype):
    """To the nearest, so errors cancel in the sum; cutting bits off would lose a third of an ulp of it."""
    s = randn(67, 33, scale=.1, dtype=dtype)
    exact, code = sinkhorn(s.double()), sinkhorn(s).double()
    assert (code - exact).sum().abs() < torch.finfo(dtype).eps / 20 * exact.sum()


@pytest.mark.parametrize("strides", [(2**31 // 3 + 1, 1), (1, 2**31 // 3 + 1)])
def test_offsets_beyond_int32(strides):
    """Four rows or columns 1.4 GB apart: 3 * stride > 2^31. The memory between is never touched."""
    far = torch.empty(2**31 + 9, dtype=torch.float16, device=DEVICE)
    three_way(far.as_strided((4, 4), strides).copy_(randn(4, 4)))


# ---- two processes

def parts():
    """name -> (all rows, how many of them are of the first process)"""
    return dict(uneven=(cosines(14, 6), 9), half=(cosines(14, 6).bfloat16(), 5), none=(cosines(14, 6), 14),
                apart=(torch.cat([cosines(5, 6), cosines(4, 6) - 40]), 5))


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    world, out = dist.group.WORLD, {}
    for name, (s, first) in parts().items():
        mine = s[first:] if rank else s[:first]
        for n in 1, 2, 3:
            for impl in "auto", "reference":
                out[name, n, impl] = sinkhorn(mine, .05, n, world, impl)
        with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as sent:
            sinkhorn(mine, .05, 3, world)
        out["sent", name] = [call.args[0].numel() for call in sent.call_args_list]
    s, first = parts()["uneven"]
    mine = s[first:] if rank else s[:first]
    f = sinkhorn if rank else torch.compile(sinkhorn, backend="aot_eager", fullgraph=True)
    out["compiled"] = f(mine, .05, 3, world)
    groups = [dist.new_group([r]) for r in (0, 1)]
    out["alone"] = sinkhorn(mine, .05, 3, groups[rank])
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    return two_processes(worker, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("name", ["uneven", "half", "none", "apart"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_two_processes_have_the_codes_of_one(both, name, impl, n):
    s, first = parts()[name]
    whole, found = sinkhorn(s, .05, n), [f[name, n, impl] for f in both]
    assert [len(f) for f in found] == [first, len(s) - first]
    tolerance = dict(atol=torch.finfo(s.dtype).eps) if name == "half" else {}
    close(torch.cat(found), whole, **tolerance)
    if name == "uneven":                                          # so there is something to reduce
        assert (sinkhorn(s[:first], .05, n) - whole[:first]).abs().max() > .05


def test_group_is_the_one_asked_for(both):
    s, first = parts()["uneven"]
    for found, mine in zip(both, (s[:first], s[first:]), strict=True):
        assert found["alone"].equal(sinkhorn(mine))


def test_only_one_number_for_each_prototype_travels(both):
    for found in both:
        assert all(found["sent", name] == [6] * 6 for name in parts())            # K for max and sum, n = 3


def test_collectives_compile(both):
    """On one of the two: what it sends, the other understands."""
    for found in both:
        assert found["compiled"].equal(found["uneven", 3, "auto"])


# ---- the operators

def test_opcheck():
    s, c, f = randn(6, 5).float(), randn(5).float(), randn(6).float()
    for strided in s, s.T.contiguous().T:
        torch.library.opcheck(kernel._columns, (strided, None, None, .05))
        torch.library.opcheck(kernel._columns, (strided, c, f, .05))
        torch.library.opcheck(kernel._rows, (strided, c, c + 1, .05))
        torch.library.opcheck(kernel._codes, (strided, c, c + 1, .05))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_without_a_break(impl):
    """Inside a training step: the codes are constants there too."""
    def loss(s1, s2):
        return -(sinkhorn(s1, impl=impl) * (s2 / .1).log_softmax(1)).sum(1).mean()

    found = []
    for f in loss, torch.compile(loss, backend="aot_eager", fullgraph=True):
        s1, s2 = (cosines(34, 17, seed=seed).float().requires_grad_() for seed in (0, 1))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
            value = f(s1, s2)
        value.backward()
        assert s1.grad is None
        found.append([value, s2.grad])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_deterministic():
    with tiles(TILES[0]):
        harness.check_deterministic(sinkhorn, randn(35, 18, dtype=torch.float16))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_codes_have_no_gradient(impl):
    s = cosines(7, 5).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        code = sinkhorn(s, impl=impl)
    assert not code.requires_grad and not kept and torch.is_grad_enabled()
    assert torch.autograd.gradcheck(partial(sinkhorn_reference, eps=.5), s)       # the definition has one


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_autocast_changes_nothing(dtype, impl):
    s = cosines(34, 17).to(dtype)
    want = sinkhorn(s, impl=impl)
    for low in torch.bfloat16, torch.float16:
        with torch.autocast(DEVICE, low):
            got = sinkhorn(s, impl=impl)
        assert got.dtype == dtype and got.equal(want)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_no_samples(impl):
    for dtype in [*LOW, torch.float64]:
        code, = run(partial(sinkhorn, impl=impl), [randn(0, 5, dtype=dtype)])
        assert code.shape == (0, 5) and code.dtype == dtype


@pytest.mark.parametrize("shape, options, words", [
    ((4,), {}, r"\[4\]"), ((2, 3, 4), {}, r"\[2, 3, 4\]"), ((4, 0), {}, r"K >= 1, got .*\[4, 0\]"),
    ((4, 3), dict(eps=0.), "eps"), ((4, 3), dict(eps=-.05), "eps"), ((4, 3), dict(eps=math.nan), "eps"),
    ((4, 3), dict(eps=math.inf), "eps"), ((4, 3), dict(iterations=0), "iterations"),
    ((4, 3), dict(iterations=-1, impl="reference"), "iterations"), ((4, 3), dict(impl="cuda"), "'cuda'"),
])
def test_errors(shape, options, words):
    with pytest.raises(ValueError, match=words):
        sinkhorn(torch.zeros(shape, device=DEVICE), **options)


def test_whole_numbers_are_no_scores():
    with pytest.raises(ValueError, match="floating"):
        sinkhorn(torch.zeros(4, 3, dtype=torch.int64, device=DEVICE))


def test_triton_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        sinkhorn(torch.zeros(4, 3, device="meta"), impl="triton")
    assert sinkhorn(torch.zeros(4, 3, device="meta")).shape == (4, 3)


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, sinkhorn
s = torch.tensor([[.75, 0], [0, 0]])
print(sinkhorn.sinkhorn(s, .25, 40)[0, 0].item())
try: sinkhorn.sinkhorn(s, impl="triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "sinkhorn.py").write_text(Path(kernel.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    code, message = out.stdout.splitlines()
    assert float(code) == pytest.approx(1 / (1 + math.exp(-1.5)), rel=1e-6)
    assert "cannot run on cpu" in message and why in message
