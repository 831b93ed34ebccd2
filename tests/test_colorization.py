"""Colorization: 313 bins, rare colours weigh more, and the encoder never sees a colour."""
import math

import pytest
import torch
from running import load, train
from torch import nn

from kernels.colour import ab_bins, lab_to_rgb, rgb_to_lab
from kernels.encoders import create_encoder, load_weights
from kernels.views import normalise

C = load("colorization")
BINS = ab_bins()


def solid(light, ab, size=32):                                   # [n] colours -> images [n,3,S,S] in 0..1
    lab = torch.cat([torch.full((len(ab), 1), light), torch.as_tensor(ab)], 1)
    return lab_to_rgb(lab[..., None, None].expand(-1, -1, size, size))


def everywhere(logits, n):                                       # [Q] -> the same at all places, [n,Q,8,8]
    return logits.view(1, -1, 1, 1).expand(n, -1, 8, 8)


# ---- bins

def test_a_colour_is_shared_among_its_five_nearest_bins():
    """(3, -1) by hand: (0,0), (10,0), (0,-10), (10,-10) and (-10,0), in the order of the distance."""
    z = C.soft_code(torch.tensor([[3., -1.], [-40., 20.]]), BINS)
    near = [(0., 0.), (10., 0.), (0., -10.), (10., -10.), (0., 10.)]
    share = torch.tensor([math.exp(-((3 - a) ** 2 + (-1 - b) ** 2) / 50) for a, b in near])
    where = torch.tensor([BINS.tolist().index(list(ab)) for ab in near])
    assert torch.allclose(z[0, where], share / share.sum(), atol=1e-5)
    assert BINS[z[1].argmax()].tolist() == [-40, 20]
    z = C.soft_code(torch.randn(500, 2) * 50, BINS)
    assert torch.allclose(z.sum(1), torch.ones(500)) and ((z > 0).sum(1) <= 5).all() and (z >= 0).all()


def test_decoding():
    """One-hot k gives bin k, an infinite temperature the mean of all bins, 1 the mean of the distribution."""
    k = torch.arange(312).view(2, 12, 13)
    sure = nn.functional.one_hot(k, 313).movedim(3, 1).float()
    assert torch.allclose(C.annealed_mean(1e3 * sure, BINS, 1.), BINS[k].movedim(3, 1), atol=1e-3)
    logits = torch.randn(2, 313, 3, 4) * 3
    hot = C.annealed_mean(logits, BINS, 1e9)
    assert torch.allclose(hot, torch.tensor([15.69, 6.68]).view(1, 2, 1, 1).expand_as(hot), atol=.01)
    mode = C.annealed_mean(logits, BINS, 1e-4)
    assert torch.allclose(mode, BINS[logits.argmax(1)].movedim(3, 1), atol=1e-3)
    p = torch.tensor([.5, .3, .2]) ** (1 / .38)                  # f_T(z): powers of the shares, normalised
    few = torch.full((1, 313, 1, 1), -1e4)
    few[0, :3, 0, 0] = torch.tensor([.5, .3, .2]).log()
    by_hand = (p / p.sum()) @ BINS[:3]
    assert torch.allclose(C.annealed_mean(few, BINS, .38).flatten(), by_hand, atol=1e-3)


# ---- rebalancing

def smoothed(p):
    """The shares p [Q] under a Gaussian of 5, by loops."""
    bins = BINS.tolist()
    near = [[math.exp(-((a - c) ** 2 + (b - d) ** 2) / 50) for c, d in bins] for a, b in bins]
    s = torch.tensor([sum(g * q for g, q in zip(row, p, strict=True)) / sum(row) for row in near])
    return s / s.sum()


def test_weights_average_to_one_over_the_smoothed_prior():
    torch.manual_seed(0)
    counts = (torch.rand(313) ** 8 * 100).long()
    z = torch.eye(313).repeat_interleave(counts, 0)
    w, p = C.class_weights(z, BINS), smoothed((counts / counts.sum()).tolist())
    assert (p * w).sum().item() == pytest.approx(1, abs=1e-5)
    by_hand = 1 / (.5 * p + .5 / 313)
    assert torch.allclose(w / w[0], by_hand / by_hand[0], rtol=1e-4)
    assert w[p.argmax()] == w.min() and w[p.argmin()] == w.max()


def test_a_flat_prior_and_lambda_one_weigh_all_colours_the_same():
    assert torch.allclose(C.class_weights(torch.eye(313), BINS), torch.ones(313), atol=1e-5)
    assert torch.allclose(C.class_weights(torch.eye(313)[:7], BINS, lam=1.), torch.ones(313), atol=1e-5)
    assert C.class_weights(torch.eye(313)[:7], BINS, lam=.5).max() > 2


def test_the_prior_is_that_of_the_training_images_and_is_kept(tmp_path, monkeypatch):
    method, _, _ = train("colorization", tmp_path, monkeypatch, "--steps", "1", "--lam", ".8")
    data = C.load_data(C.Config(data="toys:n=64"))
    ab = rgb_to_lab(data.images / 255)[:, 1:, ::4, ::4].movedim(1, 3).flatten(0, 2)
    w = C.class_weights(C.soft_code(ab, BINS), BINS, lam=.8)
    assert torch.allclose(method.state_dict()["weights"], w, rtol=1e-3) and w.max() > 1.5 * w.min()


def test_places_are_drawn_from_all_images():
    """Two colours, of half the images each: both are found, and in the right share."""
    ab = torch.tensor([[40., 0.], [0., -40.]]).repeat_interleave(150, 0)
    found = C.colours_of((255 * solid(60., ab, 8)).round().byte(), 1000)
    assert found.shape == (1000, 2) and torch.cdist(found, ab[[0, -1]]).amin(1).max() < 1
    assert abs((found[:, 0] > 20).float().mean() - .5) < .1


# ---- the loss

def test_starts_at_ln_313_and_compares_with_the_colours_of_the_view():
    method, x = C.build(C.Config()).eval(), torch.rand(4, 3, 32, 32)
    v = normalise(x)
    method.weights.copy_(torch.rand(313))
    loss = method.compare(method.predict(v), rgb_to_lab(x)[:, 1:])
    assert method(v).item() == pytest.approx(loss.item(), rel=1e-4)
    nn.init.ones_(method.weights)
    nn.init.zeros_(method.head[-1].weight)
    nn.init.zeros_(method.head[-1].bias)
    assert method(v).item() == pytest.approx(math.log(313), abs=1e-4)


def test_a_place_weighs_what_its_true_colour_does():
    """Three images of one bin each, one prediction everywhere: by hand, Eq. 2."""
    method, k, logits = C.build(C.Config()), [20, 150, 300], torch.randn(313)
    method.weights.copy_(torch.rand(313) * 3)
    ab = BINS[k][..., None, None].expand(-1, -1, 32, 32)
    z = C.soft_code(BINS[k], BINS)
    by_hand = -(method.weights[k, None] * z * logits.log_softmax(0)).sum(1).mean()
    assert method.compare(everywhere(logits, 3), ab).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_references_are_the_least_that_a_constant_costs_and_the_least_of_all():
    ab = torch.randn(4, 2, 1, 1) * 40 + torch.randn(4, 2, 32, 32) * 5
    method = C.build(C.Config())
    places = nn.functional.interpolate(ab, (8, 8), mode="nearest-exact").movedim(1, 3).flatten(0, 2)
    z = C.soft_code(places, BINS)
    method.weights.copy_(w := C.class_weights(z, BINS))
    blind, perfect = C.references(z, w).values()
    guess = (w[z.argmax(1), None] * z).sum(0).clamp_min(1e-9).log()
    assert method.compare(everywhere(guess, 4), ab).item() == pytest.approx(blind, rel=1e-4)
    for _ in range(5):
        assert method.compare(everywhere(guess + .1 * torch.randn(313), 4), ab).item() > blind + 1e-4
    out = z.clamp_min(1e-9).log().view(4, 8, 8, 313).movedim(3, 1)
    assert method.compare(out, ab).item() == pytest.approx(perfect, rel=1e-4)


def test_a_prediction_is_of_the_cell_that_it_lies_over(monkeypatch):
    """The colours of all cells, in their places, cost no more than they must; mirrored, a lot."""
    k, method = torch.randint(313, (2, 8, 8)), C.build(C.Config())
    ab = BINS[k].movedim(3, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    z = C.soft_code(BINS[k], BINS)                               # [2,8,8,313]
    out = z.clamp_min(1e-9).log().movedim(3, 1)
    least = torch.special.entr(z).sum(3).mean().item()
    assert method.compare(out, ab).item() == pytest.approx(least, rel=1e-4)
    assert min(method.compare(out, ab.flip(3)), method.compare(out, ab.mT)) > least + 3
    halves = nn.functional.one_hot(torch.tensor([20] * 4 + [150] * 4), 313).T    # [313,8] left and right
    monkeypatch.setattr(method, "predict", lambda v: 1e3 * halves[:, None].expand(2, -1, 8, -1))
    left, middle, right = method.colours(torch.zeros(2, 3, 32, 32)).split([14, 4, 14], 3)
    for side, true in (left, BINS[20]), (right, BINS[150]):
        assert torch.allclose(side, true.view(1, 2, 1, 1).expand_as(side), atol=1e-3)
    assert torch.allclose(middle.mean((0, 2, 3)), (BINS[20] + BINS[150]) / 2, atol=1e-3)


def test_grey_pictures_cost_nothing_and_others_do():
    """There is no colour to learn from an old photograph: below 5 everywhere."""
    method, ab = C.build(C.Config()), torch.full((2, 2, 32, 32), 4.9)
    assert method.compare(everywhere(torch.zeros(313), 2), ab) == 0
    ab[0, 1, 8:16, 8:16] = -20
    loss = method.compare(everywhere(torch.zeros(313), 2), ab)
    assert loss.item() == pytest.approx(math.log(313) / 2, abs=1e-4)


def test_l2_is_half_the_squared_distance_of_the_colours():
    method = C.build(C.Config(loss="l2"))
    ab = torch.tensor([[23., -14.], [20., -10.]])[..., None, None].expand(-1, -1, 32, 32)
    out = everywhere(torch.tensor([.2, -.1]), 2)                 # in hundreds
    assert method.compare(out, ab).item() == pytest.approx((3 ** 2 + 4 ** 2) / 2 / 2, rel=1e-4)
    method.head[-1].weight.data.zero_()
    method.head[-1].bias.data = out[0, :, 0, 0]
    assert torch.allclose(method.colours(torch.randn(2, 3, 32, 32)), ab[1:].expand(2, -1, -1, -1), atol=1e-4)
    with pytest.raises(SystemExit, match="--loss l1 is unknown: give classes or l2"):
        C.build(C.Config(loss="l1"))


# ---- the network

@pytest.mark.parametrize("encoder, size", [("resnet_small", 32), ("vit_micro", 32), ("resnet18", 64),
                                           ("vit_tiny/16", 64), ("resnet18", 176)])
def test_predicts_at_a_quarter_of_the_image(encoder, size):
    """Of 176 pixels, the paper's, as well, where the strides leave 88, 44, 22, 11 and 6 of them."""
    method, v = C.build(C.Config(encoder=encoder, image_size=size)), torch.zeros(2, 3, size, size)
    assert method.predict(v).shape == (2, 313, size // 4, size // 4)
    assert method.colours(v).shape == (2, 2, size, size) and method.h.shape == (2, method.encoder.dim)


def test_patches_of_any_size_are_told_where_they_lie():
    """14 pixels of 112: 8 x 8 patches, told as 32 x 32 cells of 3.5 pixels, none of which is cut off."""
    method = C.build(C.Config(encoder="vit_micro", image_size=112))
    assert method.cell == 3.5 and method.predict(torch.zeros(1, 3, 112, 112)).shape == (1, 313, 32, 32)


@pytest.mark.parametrize("bf16", [False, True])
def test_no_colour_reaches_the_encoder(bf16):
    """Other a and b under the same L: the same to see, so the same features. And L itself counts."""
    torch.manual_seed(0)
    light = 45 + 10 * torch.rand(8, 1, 32, 32)
    ab = torch.randint(0, 2, (2, 8, 2, 32, 32)) * 24. - 12       # all of them are on the screen
    a, b = (normalise(lab_to_rgb(torch.cat([light, colour], 1))) for colour in ab)
    assert (a - b).abs().max() > .4
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        grey, found = C.grey_and_ab(a)
        assert torch.allclose(grey, C.grey_and_ab(b)[0], atol=1e-4)
    assert torch.allclose(grey, normalise((light / 100).expand(-1, 3, -1, -1)), atol=1e-4)
    assert torch.allclose(found, ab[0], atol=.01)
    encoder = C.build(C.Config()).encoder.eval()
    for x, y in zip([*encoder.layers(a), encoder(a)], [*encoder.layers(b), encoder(b)], strict=True):
        assert torch.allclose(x, y, atol=1e-3)
    darker = normalise(lab_to_rgb(torch.cat([light - 5, ab[0]], 1)))
    assert (encoder(a) - encoder(darker)).abs().max() > .01


def test_the_saved_encoder_loads_without_its_wrapper(tmp_path):
    wrapped, bare = C.build(C.Config()).encoder.eval(), create_encoder("resnet_small", 32)
    torch.save(wrapped.state_dict(), tmp_path / "encoder.pt")
    load_weights(bare, tmp_path / "encoder.pt")
    v = torch.randn(2, 3, 32, 32)
    assert torch.equal(bare.eval()(C.grey_and_ab(v)[0]), wrapped(v))


# ---- the picture

@torch.no_grad()
def test_pictures_keep_the_lightness_and_end_with_the_truth():
    images = C.load_data(C.Config(data="toys:n=100")).images[:5]
    rows = C.coloured(C.build(C.Config()).eval(), images, {"mean": 1., "mode": 1e-3})
    assert list(rows) == ["grey", "mean", "mode", "truth"] and torch.equal(rows["truth"], images / 255)
    light = rgb_to_lab(images / 255)[:, :1]
    assert torch.allclose(rows["grey"], (light / 100).expand(-1, 3, -1, -1), atol=1e-4)
    mean = rgb_to_lab(rows["mean"])
    inside = ((rows["mean"] - .5).abs() < .499).all(1)           # what the screen can show was not clipped
    assert inside.float().mean() > .5 and (mean[:, 0] - light[:, 0])[inside].abs().max() < .1
    assert (mean[:, 1:].mean((0, 2, 3)) - torch.tensor([15.7, 6.7])).abs().max() < 4     # untrained: sepia
