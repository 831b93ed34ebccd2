"""Augment: the kernel against plain tensor code, against values known by hand, and by its symmetries."""
import contextlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import DEVICE, LAYOUTS, guarded, layout
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import augment
from kernels.augment import Params, apply, normalise

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy, on 0 / 0 or inf - inf in a kernel
MEAN, STD = (.485, .456, .406), (.229, .224, .225)
OFF = Params(*[None] * 7)
B, C, S, H = range(4)                                             # brightness, contrast, saturation, hue
HALF = .5                                                         # where solarise jumps
SHAPES = [(1, 1, 1), (1, 5, 7), (9, 7, 8), (8, 8, 8), (8, 5, 3), (4, 6, 9), (3, 2, 1)]    # H, W, size
INPUTS = [torch.uint8, torch.float32, torch.float16, torch.bfloat16]


@contextlib.contextmanager
def computing(dtype, block=1024):
    """Everything in this dtype, in programs of this many pixels: the interpreter likes few."""
    torch.set_default_dtype(dtype)
    try:
        with mock.patch.object(augment, "BLOCK", block):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def images(n, height, width, seed=0, dtype=torch.uint8):
    x = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return x.byte() if dtype == torch.uint8 else (x / 255).to(dtype)


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def flags(*values):
    return tensor(values, torch.bool)


def jitter(n, factors, order):
    return OFF._replace(jitter=tensor(factors).expand(n, 4), order=tensor(order, torch.int64).expand(n, 4))


def pixels(x, p, size, impl="triton"):
    """The view before it was normalised, which is linear."""
    out = apply(x, p, size, impl)
    return out * tensor(STD).view(3, 1, 1) + tensor(MEAN).view(3, 1, 1)


def params(n, height, width, seed, off):
    """Random ones, the extremes among them: a pixel, all of the image, no colour, no blur, too much of it."""
    g = torch.Generator().manual_seed(seed)

    def pick(values, *shape):
        return tensor(values)[torch.randint(len(values), shape, generator=g).to(DEVICE)]

    def side(length):
        return pick([1, length, (length + 1) // 2, 1 + seed % length], n).long()

    def place(room):
        return (torch.rand(n, generator=g).to(DEVICE) * (room + 1)).floor().long()

    h, w = side(height), side(width)
    box = torch.stack([place(height - h), place(width - w), h, w], 1)
    factors = torch.cat([pick([0., .6, 1., 1.8, 3.], n, 3), pick([-.5, 0., .1, 1 / 3, .5], n, 1)], 1)
    order = torch.rand(n, 4, generator=g).argsort(1).to(DEVICE)
    flip, grey, solarise = (pick([0, 1], n).bool() for _ in range(3))
    p = Params(box, flip, factors, order, grey, pick([0., -1., 1e-3, .3, 2., 1e3], n), solarise)
    return Params(*(None if name in off else v for name, v in zip(Params._fields, p, strict=True)))


def three_way(x, p, size, dtype, block=1024):
    """Away from the jump: 1e-12 in float64; in float32 twice the error of PyTorch and one rounding of 1."""
    with computing(torch.float64):
        exact = pixels(x, p, size, "reference")
        jump = (pixels(x, p._replace(solarise=None), size, "reference") - HALF).abs() < 1e-5
        jump = jump if p.solarise is not None else torch.zeros_like(jump)
    low = Params(*(v.to(dtype) if v is not None and v.is_floating_point() else v for v in p))
    with computing(dtype, block):
        plain = pixels(x, low, size, "reference")
        with guarded():
            got = pixels(x, low, size)
    assert got.isfinite().all()
    error, allowed = ((v - exact).masked_fill(jump, 0).abs().max().item() for v in (got, plain))
    bound = 1e-12 if dtype == torch.float64 else 2 * allowed + torch.finfo(dtype).eps
    assert error <= bound, f"error {error:.2e}, PyTorch's {allowed:.2e}, bound {bound:.2e}"


# ---- against plain tensor code

OFFS = st.sets(st.sampled_from(["box", "flip", "jitter", "grey", "sigma", "solarise"]), max_size=3)
SEEDS = st.integers(0, 2**16)


def without(off):
    return off | ({"order"} if "jitter" in off else set())


@settings(max_examples=14)
@given(st.integers(1, 2), st.sampled_from(SHAPES), SEEDS, OFFS, st.sampled_from([32, 64, 1024]),
       st.sampled_from([torch.uint8, torch.float64]))
def test_float64(n, shape, seed, off, block, dtype):
    x = images(n, *shape[:2], seed, dtype)
    three_way(x, params(n, *shape[:2], seed, without(off)), shape[2], torch.float64, block)


@settings(max_examples=14)
@given(st.integers(1, 2), st.sampled_from(SHAPES), SEEDS, OFFS, st.sampled_from(INPUTS))
def test_three_way(n, shape, seed, off, dtype):
    x = images(n, *shape[:2], seed, dtype)
    three_way(x, params(n, *shape[:2], seed, without(off)), shape[2], torch.float32)


@pytest.mark.parametrize("name", Params._fields)
def test_each_parameter_alone(name):
    off = set(Params._fields) - {name} - ({"jitter", "order"} if name in ("jitter", "order") else set())
    three_way(images(5, 9, 11), params(5, 9, 11, 3, off), 8, torch.float64)


@pytest.mark.parametrize("first", range(4))
def test_every_order(first):
    orders = [o for o in itertools.permutations(range(4)) if o[0] == first]
    p = jitter(6, [1.7, .4, 1.6, .2], orders)
    three_way(images(6, 5, 4), p, 6, torch.float64)
    with computing(torch.float64):
        views = apply(images(1, 5, 4).expand(6, -1, -1, -1), p, 6, "triton")
    far = (views[:, None] - views).abs().amax((2, 3, 4)) + torch.eye(6, device=DEVICE)
    assert far.min() > 1e-3                                       # no two orders agree


@pytest.mark.parametrize("size, block", [(31, 1024), (32, 512), (33, 512), (65, 2048)])
def test_two_tiles_and_more(size, block):
    three_way(images(1, 33, 29), params(1, 33, 29, 2, {"sigma"}), size, torch.float32, block)


@pytest.mark.parametrize("size", [2, 39, 41, 60])
@pytest.mark.parametrize("sigma", [1e-3, .7, 30.])
def test_blur_of_several_radii(size, sigma):
    three_way(images(1, size, size), OFF._replace(sigma=tensor([sigma])), size, torch.float64, 4096)


@pytest.mark.parametrize("make", [
    lambda x: x.to(memory_format=torch.channels_last), lambda x: x[:, :, ::2, 1::3], lambda x: x.flip(1).mT,
    lambda x: x[:1].expand(3, -1, -1, -1), lambda x: x[:0]])
def test_layouts_of_bytes(make):
    x = make(images(3, 12, 15))
    p = params(len(x), *x.shape[2:], 5, set())
    with computing(torch.float64):
        for impl in "triton", "reference":
            assert apply(x, p, 7, impl).equal(apply(x.contiguous(), p, 7, impl))
        torch.testing.assert_close(apply(x, p, 7, "triton"), apply(x, p, 7, "reference"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_reads_nothing_but_the_image(kind):
    """Around it lies NaN, and around a crop too."""
    x = images(3, 9, 7, dtype=torch.float32)
    three_way(layout(x, kind), params(3, 9, 7, 1, set()), 8, torch.float32)
    y = torch.full((3, 3, 9, 7), math.nan, device=DEVICE)
    y[:, :, 2:7, 1:5] = x[:, :, 2:7, 1:5]
    box = tensor([[2, 1, 5, 4]], torch.int64).expand(3, 4)
    with computing(torch.float32):
        for size in 3, 8:
            assert apply(y, OFF._replace(box=box), size, "triton").equal(
                apply(x, OFF._replace(box=box), size, "triton"))


def test_offsets_beyond_int32():
    """Images and channels 1.1 GB apart: 2 * stride > 2^31. The memory between is never touched."""
    far = torch.empty(2**32 + 2**29, dtype=torch.uint8, device=DEVICE)
    gap = 2**30 + 2**26 + 1
    for n, strides in (3, (gap, 20, 4, 1)), (1, (64, gap, 4, 1)):
        x = far.as_strided((n, 3, 5, 4), strides).copy_(images(n, 5, 4))
        three_way(x, params(n, 5, 4, 1, set()), 6, torch.float64)


# ---- values known by hand

def test_identity_gives_the_bits_of_normalise():
    x, no = images(2, 8, 8), flags(False, False)
    same = Params(tensor([[0, 0, 8, 8]] * 2, torch.int64), no, tensor([[1., 1., 1., 0.]] * 2),
                  tensor([[H, S, C, B]] * 2, torch.int64), no, tensor([0., 0.]), no)
    alone = (OFF._replace(**{k: getattr(same, k)}) for k in ("box", "flip", "grey", "sigma", "solarise"))
    with computing(torch.float32):
        for p in OFF, same, *alone:
            got = apply(x, p, 8, "triton")
            assert got.equal(normalise(x)) if DEVICE == "cpu" else (got - normalise(x)).abs().max() < 1e-6


def test_resampling():
    """Enlarged twofold: 3/4 and 1/4. Reduced: a triangle of two outputs, cut off at the border. A pixel."""
    ramp = tensor([0., 1., 5., 6.]).expand(1, 3, 4, 4) / 8
    with computing(torch.float64):
        for box, size, want in (([0, 0, 4, 2], 4, [0, .25, .75, 1]), ([0, 1, 4, 2], 4, [1, 2, 4, 5]),
                                ([0, 0, 4, 4], 2, [(.75 + 1.25) / 1.75, (.25 + 5 * .75 + 6 * .75) / 1.75]),
                                ([3, 2, 1, 1], 3, [5, 5, 5])):
            p = OFF._replace(box=tensor([box], torch.int64))
            row = tensor(want).expand(1, 3, size, size) / 8
            torch.testing.assert_close(pixels(ramp, p, size), row, rtol=0, atol=1e-14)
            torch.testing.assert_close(pixels(ramp.mT, p._replace(box=p.box[:, [1, 0, 3, 2]]), size), row.mT)
            torch.testing.assert_close(pixels(ramp, p._replace(flip=flags(True)), size), row.flip(3))


@pytest.mark.parametrize("op, factor, want", [
    (B, 0., [0, 0, 0]), (B, 2., [1, .4, .2]), (B, 1.2, [.96, .24, .12]), (S, 0., [.3680] * 3),
    (S, 2., [1, .032, 0]), (C, 0., [.3680] * 3), (C, 2., [1, .032, 0]), (H, 1 / 3, [.1, .8, .2]),
    (H, -1 / 3, [.2, .1, .8]), (H, .5, [.1, .7, .8]), (H, 0., [.8, .2, .1])])
def test_colours(op, factor, want):
    """Flat: its grey, .299 r + .587 g + .114 b, is the mean too. A third of a turn moves the channels."""
    x = tensor([.8, .2, .1]).view(1, 3, 1, 1).expand(2, 3, 3, 3)
    factors = [1., 1., 1., 0.]
    factors[op] = factor
    with computing(torch.float64):
        got = pixels(x, jitter(2, factors, [C, H, B, S]), 3)
    torch.testing.assert_close(got, tensor(want).view(3, 1, 1).expand(2, 3, 3, 3), rtol=0, atol=1e-12)


def test_contrast_takes_the_mean_at_its_turn():
    """Of a black and white image, made twice as bright before it or after it."""
    x = tensor([[0., .75]]).expand(1, 3, 2, 2)
    with computing(torch.float64):
        after = pixels(x, jitter(1, [2., 0., 1., 0.], [B, H, C, S]), 2)
        before = pixels(x, jitter(1, [2., 0., 1., 0.], [S, C, B, H]), 2)
    assert after.flatten().tolist() == pytest.approx([.5] * 12)   # the mean of 0 and clamp(1.5)
    assert before.flatten().tolist() == pytest.approx([.75] * 12)


def test_grey_and_solarise():
    x = torch.arange(120, 136, device=DEVICE).byte().view(1, 1, 4, 4).repeat(2, 3, 1, 1)
    with computing(torch.float64):
        got = pixels(x, OFF._replace(solarise=flags(True, False)), 4) * 255
        colour = tensor([.8, .2, .1]).view(1, 3, 1, 1).repeat(2, 1, 2, 2)
        grey = pixels(colour, OFF._replace(grey=flags(False, True)), 2)
    assert (got[0, 2].flatten().round().tolist() == [v if v < 128 else 255 - v for v in range(120, 136)])
    assert got[1].round().equal(x[1].double())
    torch.testing.assert_close(grey[0], colour[0])
    torch.testing.assert_close(grey[1], torch.full_like(grey[1], .2392 + .1174 + .0114))


@pytest.mark.parametrize("size, radius", [(7, 1), (39, 1), (40, 2), (60, 3)])
def test_blur_of_a_point(size, radius):
    """A Gaussian of 2 radius + 1 taps, reflected at the border, not doubling it; at sigma = 0 the point."""
    x = torch.zeros(2, 3, size, size, dtype=torch.float64, device=DEVICE)
    x[..., 1, size - 1] = 1
    w = {r: math.exp(-r * r / (2 * .8**2)) for r in range(-radius, radius + 1)}

    def seen(place):
        def fold(j):
            return -j if j < 0 else 2 * (size - 1) - j if j >= size else j
        line = [sum(v for r, v in w.items() if fold(i + r) == place) for i in range(size)]
        return tensor(line) / sum(w.values())

    with computing(torch.float64, 4096):
        got = pixels(x, OFF._replace(sigma=tensor([.8, 0.])), size)
        sharp = pixels(x, OFF, size)
    torch.testing.assert_close(got[0, 1], seen(1)[:, None] * seen(size - 1), rtol=0, atol=1e-14)
    assert got[1].equal(sharp[1])


# ---- symmetries

def test_each_image_is_on_its_own():
    x, p = images(5, 9, 8), params(5, 9, 8, 7, set())
    with computing(torch.float32):
        want = apply(x, p, 8, "triton")
        order = [3, 0, 4, 2, 1]
        assert apply(x[order], Params(*(v[order] for v in p)), 8, "triton").equal(want[order])
        y = x.clone()
        y[2] = 255 - y[2]
        assert apply(y, p, 8, "triton").ne(want).flatten(1).any(1).tolist() == [i == 2 for i in range(5)]
        assert apply(x, p, 8, "triton").equal(want)               # and the same bits again


@settings(max_examples=4)
@given(SEEDS, st.sampled_from([4, 8]))
def test_mirrored_and_turned(seed, size):
    """To flip is to mirror the image and its box; to transpose both transposes the view."""
    x, p = images(1, 7, 7, seed), params(1, 7, 7, seed, {"flip"})
    top, left, h, w = p.box.T
    with computing(torch.float64):
        got = pixels(x, p._replace(solarise=None), size)
        mirrored = p._replace(box=torch.stack([top, 7 - left - w, h, w], 1), solarise=None)
        turned = p._replace(box=torch.stack([left, top, w, h], 1), solarise=None)
        for same in (pixels(x.flip(3), mirrored, size).flip(3), pixels(x.mT, turned, size).mT,
                     pixels(x, p._replace(flip=flags(True), solarise=None), size).flip(3)):
            torch.testing.assert_close(same, got, rtol=0, atol=1e-12)


def test_flat_images_stay_flat():
    """Weights sum to 1 whatever the box, the flip and the blur."""
    x = torch.full((4, 3, 11, 6), 77, dtype=torch.uint8, device=DEVICE)
    with computing(torch.float64):
        got = pixels(x, params(4, 11, 6, 3, {"jitter", "order", "solarise"}), 5) * 255
    torch.testing.assert_close(got, torch.full_like(got, 77), rtol=0, atol=1e-10)


# ---- the operator

def test_opcheck():
    x, p = images(2, 5, 4), params(2, 5, 4, 1, {"sigma"})
    for kernel in True, False:
        torch.library.opcheck(augment._forward, (x, [*p], 3, kernel))


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_compiles_without_a_break(impl):
    x, p = images(2, 5, 4), params(2, 5, 4, 1, set())
    with computing(torch.float32):
        compiled = torch.compile(lambda x, p: apply(x, p, 3, impl) * 2, backend="aot_eager", fullgraph=True)
        assert compiled(x, p).equal(apply(x, p, 3, impl) * 2)


def test_no_word_from_gpu_to_cpu():
    """On the meta device, where no value can be known, the launches are all there is left to do."""
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    x, p = images(2, 40, 36), params(2, 40, 36, 1, set())
    p = Params(*(v.to("meta") for v in p))
    with mock.patch.object(augment, "_forward_kernel", Kernel()), \
            mock.patch.object(torch, "tensor", side_effect=AssertionError("a copy from the host")):
        assert augment._forward_triton(x.to("meta"), p, 33).shape == (2, 3, 33, 33)
    assert launches == [(2 * -(-33 * 33 // augment.BLOCK),)] * 4


def test_auto_never_interprets():
    """So that methods on a CPU run at full speed, in tests too; a GPU gets the kernel."""
    x = images(2, 5, 4)
    with mock.patch.object(augment, "_forward_triton", side_effect=AssertionError("the kernel ran")):
        if DEVICE == "cpu":
            assert apply(x, OFF, 4).equal(apply(x, OFF, 4, "reference"))
        with pytest.raises(AssertionError, match="the kernel ran"):
            apply(x, OFF, 4, "auto" if DEVICE == "cuda" else "triton")


def test_no_gradient_no_autocast():
    x, p = images(2, 5, 4, dtype=torch.float32), params(2, 5, 4, 1, set())
    with computing(torch.float32):
        want = apply(x, p, 4, "triton")
        with torch.autocast(DEVICE, torch.bfloat16):
            got = apply(x.requires_grad_(), p, 4, "triton")
    assert got.equal(want) and got.dtype == torch.float32 and not got.requires_grad


@pytest.mark.parametrize("change, impl, words", [
    (dict(flip=torch.ones(3)), "auto", "the 2 images"), (dict(sigma=torch.ones(1)), "triton", "the 2 images"),
    ({}, "cuda", "'cuda'")])
def test_errors(change, impl, words):
    with pytest.raises(ValueError, match=words):
        apply(images(2, 4, 4), OFF._replace(**change), 4, impl)


def test_triton_where_it_cannot_run():
    x = torch.zeros(2, 3, 5, 5, device="meta")
    with pytest.raises(RuntimeError, match="cannot run on meta"):
        apply(x, OFF, 4, "triton")
    assert apply(x, OFF, 4).shape == (2, 3, 4, 4)


ALONE = """
import sys
if sys.argv[1] == "none": sys.modules["triton"] = None
import torch, augment
p = augment.Params(torch.tensor([[0, 0, 1, 2]]), *[None] * 6)
x = torch.tensor([0, 255, 9, 9]).byte().view(1, 1, 2, 2).repeat(1, 3, 1, 1)
print((augment.apply(x, p, 4)[0, 0, 0] * .229 + .485).tolist())
try: augment.apply(x, p, 4, "triton")
except RuntimeError as e: print(e)
"""


@pytest.mark.parametrize("triton, why", [("none", "triton is missing or too old"), ("there", "no GPU")])
def test_alone_in_a_folder(tmp_path, triton, why):
    (tmp_path / "augment.py").write_text(Path(augment.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", ALONE, triton]
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    row, message = out.stdout.splitlines()
    assert eval(row) == pytest.approx([0, .25, .75, 1], abs=1e-6)
    assert "cannot run on cpu" in message and why in message
