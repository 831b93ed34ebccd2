"""kernels/views.py against definitions that share no code with it: loops, colorsys, PIL, interpolate."""
import colorsys
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from kernels.views import Params, apply, denormalise, draw, normalise, views

MEAN, STD = (.485, .456, .406), (.229, .224, .225)  # ImageNet's
OFF = Params(*[None] * 7)
TOL = 1e-5        # in units of [0,1]: float32 rounding, 400 times finer than 1/255
B, C, S, H = 0, 1, 2, 3
IDENTITY = (1., 1., 1., 0.)


def images(n, height=16, width=16, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


def pixels(x, params, size):
    """apply, taken back to [0,1] without the clamp of denormalise, in float64"""
    out = apply(x, params, size).double()
    return out * torch.tensor(STD).double().view(3, 1, 1) + torch.tensor(MEAN).double().view(3, 1, 1)


def rows(image):
    return (image.permute(1, 2, 0).double() / 255).tolist()


def luma(p):
    return .299 * p[0] + .587 * p[1] + .114 * p[2]


def clip(v):
    return min(1., max(0., v))


def slow_op(op, factor, img):
    flat = [p for row in img for p in row]
    mean = sum(map(luma, flat)) / len(flat)

    def one(p):
        if op == B:
            return [clip(factor * v) for v in p]
        if op == C:
            return [clip(factor * v + (1 - factor) * mean) for v in p]
        if op == S:
            return [clip(factor * v + (1 - factor) * luma(p)) for v in p]
        h, s, v = colorsys.rgb_to_hsv(*p)
        return list(colorsys.hsv_to_rgb((h + factor) % 1, s, v))

    return [[one(p) for p in row] for row in img]


def slow_jitter(image, factors, order):
    img = rows(image)
    for op in order:
        img = slow_op(op, factors[op], img)
    return torch.tensor(img).permute(2, 0, 1)


def jittered(x, factors, order):
    n = len(x)
    return OFF._replace(jitter=torch.tensor(factors).expand(n, 4), order=torch.tensor(order).expand(n, 4))


def test_normalise_is_the_textbook_formula_and_round_trips():
    x = images(3, 5, 7)
    want = (x.numpy() / 255. - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert normalise(x).dtype == torch.float32
    np.testing.assert_allclose(normalise(x).numpy(), want, atol=2e-6)
    assert ((denormalise(normalise(x)) * 255).round().byte() == x).all()
    assert (normalise(x.float() / 255) == normalise(x)).all()
    extremes = denormalise(torch.tensor([-9., 0., 9.]).view(1, 3, 1, 1)).flatten()
    assert extremes.tolist() == pytest.approx([0, .456, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_gives_float32(dtype):
    x = (images(2) / 255).to(dtype)
    assert views(x).dtype == torch.float32
    assert (normalise(x) == normalise(x.float())).all()


@pytest.mark.parametrize("f", [normalise, views, lambda x: apply(x, OFF, 8)])
@pytest.mark.parametrize("bad, says", [
    (torch.zeros(3, 8, 8), "B,3,H,W"), (torch.zeros(8), "B,3,H,W"), (torch.zeros(2, 1, 8, 8), "B,3,H,W"),
    (torch.zeros(2, 8, 8, 3), "B,3,H,W"), (torch.zeros(2, 3, 8, 8).long(), "int64"),
    (torch.zeros(2, 3, 8, 8).bool(), "bool")])
def test_what_is_no_image_is_a_clear_error(f, bad, says):
    with pytest.raises(ValueError, match=says):
        f(bad)


def test_the_caller_s_images_are_never_written_to():
    x = torch.rand(6, 3, 8, 8)
    before, every = x.clone(), torch.ones(6, dtype=torch.bool)
    for p in (OFF._replace(grey=every), OFF._replace(solarise=every), OFF._replace(sigma=every.float()),
              jittered(x, (1., 1., 1., .3), (H, B, C, S)), OFF):
        apply(x, p, 8)
        assert (x == before).all()


@pytest.mark.parametrize("name", ["off", "box", "flip", "jitter", "grey", "sigma", "solarise", "all"])
def test_identity_parameters_give_exactly_normalise(name):
    x, none = images(5), torch.zeros(5, dtype=torch.bool)
    parts = {"off": {}, "box": dict(box=torch.tensor([0, 0, 16, 16]).expand(5, 4)), "flip": dict(flip=none),
             "jitter": jittered(x, IDENTITY, (H, S, C, B))._asdict(), "grey": dict(grey=none),
             "sigma": dict(sigma=none.float()), "solarise": dict(solarise=none)}
    chosen = parts.values() if name == "all" else [parts[name]]
    params = {k: v for part in chosen for k, v in part.items() if v is not None}
    assert (apply(x, OFF._replace(**params), 16) == normalise(x)).all()


def test_options_at_zero_are_none_and_views_is_normalise():
    off = dict(scale=None, flip=0, p_jitter=0, grey=0)
    assert all(f is None for f in draw(9, 8, 8, **off))
    assert all(f is not None for f in draw(9, 8, 8, blur=.5, solarise=.5))
    assert (views(images(9), **off) == normalise(images(9))).all()


@pytest.mark.parametrize("height, width, size", [
    (16, 16, 16), (16, 16, 37), (16, 16, 5), (21, 34, 16), (40, 13, 24), (7, 50, 1), (64, 64, 24)])
def test_crop_is_slice_then_interpolate(height, width, size):
    """bilinear where it is enlarged, antialiased where it is reduced, blind to what is outside"""
    x = images(24, height, width)
    box = draw(24, height, width, scale=(.02, 1.), ratio=(.5, 2.)).box
    got = pixels(x, OFF._replace(box=box), size)
    for k, (t, le, h, w) in enumerate(box.tolist()):
        crop = x[k:k + 1, :, t:t + h, le:le + w].double() / 255
        want = F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)
        torch.testing.assert_close(got[k:k + 1], want, atol=TOL, rtol=0)
        if h <= size and w <= size:   # enlarging: plain bilinear
            plain = F.interpolate(crop, (size, size), mode="bilinear", align_corners=False)
            torch.testing.assert_close(got[k:k + 1], plain, atol=TOL, rtol=0)


@pytest.mark.parametrize("size", [10, 48])
def test_crop_is_pil_s(size):
    """PIL rounds to whole grey levels after each of its two passes: tolerance one level"""
    x = images(6, 30, 41, seed=3)
    box = torch.tensor([[0, 0, 30, 41], [3, 5, 20, 20], [29, 40, 1, 1], [0, 0, 30, 1], [11, 2, 4, 39],
                        [7, 7, 9, 16]])
    got = pixels(x, OFF._replace(box=box), size)
    for k, (t, le, h, w) in enumerate(box.tolist()):
        crop = Image.fromarray(x[k].permute(1, 2, 0).numpy()).crop((le, t, le + w, t + h))
        want = np.array(crop.resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(got[k].permute(1, 2, 0).numpy() - want / 255).max() <= 1.01 / 255


def test_crop_without_resize_is_a_slice():
    x = images(1, 20, 30)
    box = torch.tensor([[3, 11, 8, 8]])
    assert (apply(x, OFF._replace(box=box), 8) == normalise(x[:, :, 3:11, 11:19])).all()


def test_flip_mirrors_the_chosen_images_and_twice_is_nothing():
    x = images(4, 16, 16)
    p = OFF._replace(flip=torch.tensor([True, False, True, False]))
    once = apply(x, p, 16)
    assert (once[0::2] == normalise(x[0::2].flip(3))).all() and (once[1::2] == normalise(x[1::2])).all()
    twice = pixels(denormalise(once), p, 16)
    torch.testing.assert_close(twice, x.double() / 255, atol=TOL, rtol=0)
    # with a crop: mirror what was cropped, not the place it was cropped from
    box = torch.tensor([[2, 1, 9, 5]]).expand(4, 4)
    cropped = apply(x, OFF._replace(box=box), 12)
    both = apply(x, p._replace(box=box), 12)
    torch.testing.assert_close(both[0::2], cropped[0::2].flip(3), atol=TOL, rtol=0)
    assert (both[1::2] == cropped[1::2]).all()


CORNERS = torch.tensor(list(itertools.product([0, 1, 127, 128, 254, 255], repeat=3)))  # ties, greys, extremes


@pytest.mark.parametrize("op, factor", [
    (B, 0.), (B, .6), (B, 1.4), (C, 0.), (C, .6), (C, 1.8), (S, 0.), (S, .6), (S, 1.9),
    (H, -.5), (H, -.1), (H, 1e-3), (H, .1), (H, 1 / 3), (H, .5)])
def test_each_colour_operation_on_its_own(op, factor):
    corners = CORNERS.T.reshape(1, 3, 12, 18)
    x = torch.cat([corners[..., :12], corners[..., 6:], images(2, 12, 12)]).byte()
    factors = [*IDENTITY]
    factors[op] = factor
    got = pixels(x, jittered(x, factors, (C, H, B, S)), 12)
    for k in range(len(x)):
        want = torch.tensor(slow_op(op, factor, rows(x[k]))).permute(2, 0, 1).double()
        torch.testing.assert_close(got[k], want, atol=TOL, rtol=0)


def test_every_image_has_its_own_order_and_its_own_factors():
    orders = torch.tensor(list(itertools.permutations(range(4))))  # all 24
    torch.manual_seed(1)
    p = draw(24, 8, 8, scale=None, flip=0, grey=0, p_jitter=1, jitter=(.9, .9, .9, .4))
    p = p._replace(order=orders)
    x = images(24, 8, 8)
    got = pixels(x, p, 8)
    for k in range(24):
        want = slow_jitter(x[k], p.jitter[k].tolist(), orders[k].tolist())
        torch.testing.assert_close(got[k], want.double(), atol=TOL, rtol=0)
    same = images(1, 8, 8).expand(24, -1, -1, -1)
    out = apply(same, p._replace(jitter=torch.tensor([1.7, .4, 1.6, .2]).expand(24, 4)), 8)
    d = (out[:, None] - out[None]).abs().amax((2, 3, 4)) + torch.eye(24)
    assert d.min() > 1e-3  # no two orders agree


def test_grey_is_the_luma_of_the_chosen_images():
    x = images(6)
    chosen = torch.tensor([True, False, False, True, True, False])
    got = pixels(x, OFF._replace(grey=chosen), 16)
    for k in range(6):
        p = rows(x[k])
        want = torch.tensor([[[luma(v)] * 3 if chosen[k] else v for v in row] for row in p]).permute(2, 0, 1)
        torch.testing.assert_close(got[k], want.double(), atol=TOL, rtol=0)
        pil = torch.from_numpy(np.array(Image.fromarray(x[k].permute(1, 2, 0).numpy()).convert("L")))
        if chosen[k]:
            assert (got[k] - pil / 255).abs().max() <= .51 / 255  # PIL rounds to a grey level


@pytest.mark.parametrize("size, taps", [(8, 3), (32, 3), (41, 5), (64, 7), (96, 9)])
def test_blur_is_a_convolution_with_reflected_border(size, taps):
    x = images(4, size, size)
    sigma = torch.tensor([.1, 0., .7, 2.])
    got = pixels(x, OFF._replace(sigma=sigma), size)
    radius = taps // 2
    for k, s in enumerate(sigma.tolist()):
        line = torch.tensor([math.exp(-r * r / (2 * s * s)) if s else float(r == 0)
                             for r in range(-radius, radius + 1)]).double()
        kernel = torch.outer(line, line) / line.sum() ** 2
        padded = F.pad(x[k:k + 1].double() / 255, [radius] * 4, mode="reflect").transpose(0, 1)
        want = F.conv2d(padded, kernel[None, None]).transpose(0, 1)[0]
        torch.testing.assert_close(got[k], want, atol=TOL, rtol=0)


def test_kernel_is_23_taps_at_224_as_in_the_papers():
    x = torch.zeros(1, 3, 224, 224)
    x[..., 112, 112] = 1
    lit = (pixels(x, OFF._replace(sigma=torch.tensor([50.])), 224)[0, 0] > 1e-4).nonzero()
    assert lit.amin(0).tolist() == [101, 101] and lit.amax(0).tolist() == [123, 123]


def test_solarise_inverts_from_128_up():
    x = torch.arange(256).byte().view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    got = (pixels(x, OFF._replace(solarise=torch.tensor([False, True])), 16) * 255).round().long()
    assert got[0, 0].flatten().tolist() == list(range(256))
    assert got[1, 2].flatten().tolist() == [v if v < 128 else 255 - v for v in range(256)]


def test_operations_come_in_byol_s_order():
    """crop, flip, jitter, grey, blur, solarise one call each, against all of them in one call"""
    x = images(8, 24, 24)
    torch.manual_seed(5)
    p = draw(8, 24, 24, flip=.5, p_jitter=1, grey=.5, blur=.7, sigma=(.5, 2.), solarise=.7)
    step = apply(x, OFF._replace(box=p.box), 16)
    stages = [dict(flip=p.flip), dict(jitter=p.jitter, order=p.order), dict(grey=p.grey), dict(sigma=p.sigma),
              dict(solarise=p.solarise)]
    for stage in stages:
        step = apply(denormalise(step), OFF._replace(**stage), 16)
    # a pixel within 1e-5 of the threshold may fall on either side of it
    near = (denormalise(apply(x, p._replace(solarise=None), 16)) - .5).abs() < 1e-5
    assert near.float().mean() < .01
    assert ((apply(x, p, 16) - step).abs()[~near] < 1e-4).all()


N = 20000


def assert_rate(hits, p, n=N):
    assert abs(int(hits) - n * p) <= 5 * math.sqrt(n * p * (1 - p)), (int(hits), n * p)   # 5 sigma


def assert_uniform(v, low, high):
    """inside [low, high], and the Kolmogorov-Smirnov distance within its one-in-10^5 bound"""
    v = (v.double().sort().values - low) / (high - low)
    assert v[0] >= -1e-6 and v[-1] <= 1 + 1e-6
    steps = torch.arange(len(v) + 1).double() / len(v)
    assert max((steps[1:] - v).max(), (v - steps[:-1]).max()) < 2.5 / math.sqrt(len(v))


def test_probabilities():
    torch.manual_seed(0)
    p = draw(N, 32, 32, flip=.3, p_jitter=.7, grey=.1, blur=.6, solarise=.25)
    moved = (p.jitter != torch.tensor(IDENTITY)).any(1)
    for hits, rate in ((p.flip, .3), (moved, .7), (p.grey, .1), (p.sigma > 0, .6), (p.solarise, .25),
                       (p.flip & p.grey, .03), (moved & p.grey, .07), ((p.sigma > 0) & p.solarise, .15)):
        assert_rate(hits.sum(), rate)
    sure = draw(N, 32, 32, flip=1, p_jitter=1, grey=1, blur=1, solarise=1)
    assert sure.flip.all() and sure.grey.all() and sure.solarise.all() and (sure.sigma > 0).all()
    assert (sure.jitter != torch.tensor(IDENTITY)).any(1).all()


def test_factors_orders_and_sigma_are_uniform():
    torch.manual_seed(0)
    p = draw(N, 32, 32, p_jitter=1, jitter=(.4, 1.5, .2, .1), blur=1, sigma=(.1, 2.))
    for op, low, high in (B, .6, 1.4), (C, 0, 2.5), (S, .8, 1.2), (H, -.1, .1):
        assert_uniform(p.jitter[:, op], low, high)
    assert_uniform(p.sigma, .1, 2.)
    assert (p.order.sort(1).values == torch.arange(4)).all()
    counts = torch.unique(p.order, dim=0, return_counts=True)[1]
    assert len(counts) == 24
    for c in counts:
        assert_rate(c, 1 / 24)
    assert abs(torch.corrcoef(p.jitter.T) - torch.eye(4)).max() < .04  # drawn apart


@pytest.mark.parametrize("height, width, scale, ratio", [
    (32, 32, (.2, 1.), (3 / 4, 4 / 3)), (96, 64, (.08, .5), (.5, 2.)), (50, 300, (.05, .14), (3 / 4, 4 / 3)),
    (60, 60, (.1, .4), (1., 2.5))])
def test_boxes_are_inside_and_within_scale_and_ratio(height, width, scale, ratio):
    torch.manual_seed(0)
    top, left, h, w = draw(N, height, width, scale=scale, ratio=ratio).box.T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    # sides are rounded to pixels: the true sides lie within half a pixel of them
    assert ((h + .5) * (w + .5) >= scale[0] * height * width).all()
    assert ((h - .5) * (w - .5) <= scale[1] * height * width).all()
    assert ((w + .5) / (h - .5) >= ratio[0]).all() and ((w - .5) / (h + .5) <= ratio[1]).all()
    assert len(torch.unique(h)) > 10 and len(torch.unique(w)) > 10


def test_small_boxes_follow_the_distributions():
    """a box of at most 1/4 of the area always fits: area, log ratio and corner are uniform"""
    torch.manual_seed(0)
    top, left, h, w = draw(N, 1000, 1000, scale=(.05, .25), ratio=(.5, 2.)).box.T.double()
    assert_uniform(h * w / 1e6, .05 - 2e-3, .25 + 2e-3)
    assert_uniform((w / h).log(), math.log(.5) - .01, math.log(2) + .01)
    assert_uniform((top + .5) / (1000 - h + 1), 0, 1)
    assert_uniform((left + .5) / (1000 - w + 1), 0, 1)
    assert abs(torch.corrcoef(torch.stack([top, left]))[0, 1]) < .04


def test_corner_reaches_both_ends():
    torch.manual_seed(0)
    top, left, h, w = draw(N, 6, 7, scale=(.2, .3)).box.T
    assert (top == 0).any() and (top + h == 6).any() and (left == 0).any() and (left + w == 7).any()


def test_ten_tries():
    """one try fails with probability q, so q^10 is the share of fallback boxes"""
    torch.manual_seed(0)
    box = draw(N, 100, 100, scale=(.9, 1.), ratio=(.5, 2.)).box
    area, aspect = torch.rand(10 ** 6) * .1 + .9, 2 ** (torch.rand(10 ** 6) * 2 - 1)
    w, h = (area * aspect).sqrt() * 100, (area / aspect).sqrt() * 100
    q = ((w.round() > 100) | (h.round() > 100)).double().mean().item()
    whole = ((w.round() == 100) & (h.round() == 100)).double().mean().item()  # these look like the fallback
    assert_rate((box[:, 2:] == 100).all(1).sum(), q ** 10 + (1 - q ** 10) * whole / (1 - q))


@pytest.mark.parametrize("height, width, box", [
    (100, 20, [36, 0, 27, 20]), (20, 101, [0, 37, 20, 27]), (40, 40, [0, 0, 40, 40])])
def test_fallback_is_the_largest_centred_box(height, width, box):
    """an area that can never fit: torchvision's centre crop with the nearest ratio allowed"""
    assert (draw(50, height, width, scale=(5., 6.)).box == torch.tensor(box)).all()


def test_images_in_a_batch_are_independent():
    x = images(150, 32, 32)  # more than one chunk
    torch.manual_seed(0)
    p = draw(150, 32, 32, blur=.5, solarise=.5)
    before = apply(x, p, 32)
    for k in 3, 64, 149:
        y = x.clone()
        y[k] = 255 - y[k]
        changed = (apply(y, p, 32) != before).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [k]


def test_parameters_stay_with_their_images():
    """a permuted batch with permuted parameters is the permuted output, across chunks"""
    x = images(200, 32, 32)
    p, i = draw(200, 32, 32, blur=.5, solarise=.5), torch.randperm(200)
    moved = apply(x[i], Params(*(f[i] for f in p)), 32)
    torch.testing.assert_close(moved, apply(x, p, 32)[i], atol=1e-4, rtol=0)


def test_same_seed_same_bits_and_another_call_another_view():
    x = images(70, 32, 32)
    torch.manual_seed(7)
    v1, v2 = views(x, blur=.5, solarise=.2), views(x, blur=.5, solarise=.2)
    torch.manual_seed(7)
    w1, w2 = views(x, blur=.5, solarise=.2), views(x, blur=.5, solarise=.2)
    assert (v1 == w1).all() and (v2 == w2).all()
    assert ((v1 - v2).abs().mean((1, 2, 3)) > .01).all()


def test_one_image_in_a_batch_gets_many_views():
    v = views(images(1, 32, 32).expand(40, -1, -1, -1))
    d = (v[:, None] - v[None]).abs().mean((2, 3, 4)) + torch.eye(40)
    assert d.min() > .01


@pytest.mark.parametrize("height, width, size, side", [
    (32, 32, None, 32), (32, 32, 16, 16), (20, 45, None, 20), (45, 20, 64, 64), (3, 9, 4, 4),
    (300, 280, 270, 270)])
def test_sizes_and_multicrop(height, width, size, side):
    x = images(5, height, width)
    v = views(x, size, scale=(.05, .3), blur=.5, solarise=.5)
    assert v.shape == (5, 3, side, side) and v.dtype == torch.float32 and v.is_contiguous()
    low, high = normalise(torch.zeros(1, 3, 1, 1)), normalise(torch.ones(1, 3, 1, 1))
    assert ((v >= low - 1e-4) & (v <= high + 1e-4)).all()
    assert (v.flatten(1).std(1) > 0).all()


def test_multicrop_sees_less_of_the_image():
    """on a ramp, a crop of scale s spans about sqrt(s) of the range of the whole image"""
    x = torch.linspace(0, 1, 64).expand(100, 3, 64, 64)
    off = dict(flip=0, p_jitter=0, grey=0)
    for scale in (.05, .14), (.5, 1.):
        v = denormalise(views(x, 24, scale=scale, **off))[:, 0, 0]
        span = v[:, -1] - v[:, 0]
        assert (span > math.sqrt(scale[0] * .75) * .9 - .06).all()
        assert (span < math.sqrt(scale[1] * 4 / 3)).all()


def test_no_graph_autocast_or_empty_batch_surprises():
    x = (images(3) / 255).requires_grad_()
    assert not views(x).requires_grad
    torch.manual_seed(0)
    want = views(images(3), blur=1)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (views(images(3), blur=1) == want).all()
    assert views(images(3)[:0], 12, blur=.5, solarise=.5).shape == (0, 3, 12, 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu_and_draws_there():
    x, p = images(200, 40, 32), draw(200, 40, 32, blur=.5)
    on_gpu = apply(x.cuda(), Params(*(f if f is None else f.cuda() for f in p)), 32)
    torch.testing.assert_close(on_gpu.cpu(), apply(x, p, 32), atol=1e-4, rtol=0)
    assert all(f.is_cuda for f in draw(3, 8, 8, blur=1, solarise=1, device="cuda"))
    assert views(x.cuda(), blur=1, solarise=1).is_cuda


def test_drawing_copies_nothing_from_the_host():
    """So CUDA graphs can capture it. On the meta device a word back would fail by itself."""
    with mock.patch.object(torch, "tensor", side_effect=AssertionError("a copy from the host")):
        p = draw(5, 40, 32, blur=.5, solarise=.5, device="meta")
        assert all(f.is_meta and len(f) == 5 for f in p)
        assert views(torch.zeros(5, 3, 40, 32, device="meta"), 24, blur=.5).shape == (5, 3, 24, 24)


def test_blur_of_a_single_pixel():
    x = images(2, 1, 1)
    assert (apply(x, OFF._replace(sigma=torch.tensor([.5, 2.])), 1) == normalise(x)).all()


def test_impl_goes_through():
    x = images(2)
    torch.manual_seed(0)
    want = views(x)
    torch.manual_seed(0)
    assert (views(x, impl="reference") == want).all()
    with pytest.raises(ValueError, match="'cuda'"):
        views(x, impl="cuda")
