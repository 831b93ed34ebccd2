"""Context prediction: where the patches come from, what is taken out of them, and what is left to learn."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from running import load, train
from torch import nn

from kernels.encoders import create_encoder, load_weights
from kernels.views import denormalise, normalise

C = load("context_prediction")
MAGENTA = torch.tensor([-1., 2., -1.]).view(3, 1, 1)


class First(nn.Module):
    """An encoder that returns the first pixel's red."""
    dim = 1

    def forward(self, x):
        return x[:, 0, 0, 0, None]


def method(**flags):
    return C.build(replace(C.Config(), **flags))


def coordinates(side, n=1):
    """Images whose pixels say where they are: row, column, and 0."""
    row, col = torch.meshgrid(torch.arange(1. * side), torch.arange(1. * side), indexing="ij")
    return torch.stack([row, col, 0 * row]).expand(n, -1, -1, -1)


# ---- where the patches come from

@pytest.mark.parametrize("patch, gap, jitter, side", [(16, 6, 2, 64), (5, 4, 1, 30), (7, 3, 0, 28)])
def test_patches_lie_on_a_grid_in_the_middle_apart_and_jittered(patch, gap, jitter, side):
    p = C.cut(coordinates(side, 400), patch, gap, jitter)
    assert p.shape == (400, 9, 3, patch, patch)
    margin, cell = (side - 3 * patch - 2 * gap) // 2, torch.arange(9)
    top, left = p[:, :, 0, 0, 0], p[:, :, 1, 0, 0]               # [400,9]
    for start, at in ((top, cell // 3), (left, cell % 3)):
        shift = start - margin - (patch + gap) * at
        assert shift.min() == -jitter and shift.max() == jitter
        assert shift.mean(0).abs().max() <= 5 * (jitter * (jitter + 1) / 3 / 400) ** .5     # 5 sigma
    assert (left[:, 1] - left[:, 0] - patch).min() == gap - 2 * jitter   # the least distance of two borders
    assert torch.equal(p - p[..., :1, :1], coordinates(patch).expand(400, 9, -1, -1, -1))   # windows, whole
    if jitter:                                                   # each patch by itself, both ways apart
        shifts = torch.stack([top, left], 2).flatten(1)
        assert torch.corrcoef(shifts.T).fill_diagonal_(0).abs().max() < .25


def test_no_patch_of_the_default_or_the_paper_touches_another():
    for cfg in (C.Config(), C.Config(**C.PAPER)):
        assert cfg.gap - 2 * cfg.jitter > 0
    assert cfg.gap - 2 * cfg.jitter == 34                        # the paper's
    touching = C.cut(coordinates(48), 16, 0, 0)[0]
    assert touching[1, 1, 0, 0] == touching[0, 1, 0, -1] + 1     # --gap 0 --jitter 0: lines continue


def test_training_is_jittered_and_evaluation_is_not(monkeypatch):
    m, x = method(), normalise(torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8))
    seen = []
    monkeypatch.setattr(m.encoder, "prepare", lambda p: seen.append(p) or p)
    m(x), m(x), m.encoder(x), m.encoder(x)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    grid = denormalise(x)[:, :, 2:62, 2:62]                      # 3 x 16 + 2 x 6, in the middle of 64
    for n, (i, j) in enumerate((i, j) for i in (0, 22, 44) for j in (0, 22, 44)):
        assert torch.allclose(seen[2].view(6, 9, 3, 16, 16)[:, n], grid[..., i:i + 16, j:j + 16], atol=1e-5)


def test_labels_are_the_cells_around_the_centre_row_by_row(monkeypatch):
    """Images whose nine cells are of brightness 0 to 8: the pairs are 4 with 0 1 2 3 5 6 7 8, in order."""
    m, seen = C.ContextPrediction(First(), jitter=0), []
    monkeypatch.setattr(m.encoder, "prepare", lambda p: (10 * p).round())
    x = (torch.arange(9.) / 10).view(1, 1, 3, 3).expand(3, 3, -1, -1)
    x = normalise(F.interpolate(x, (66, 66), mode="nearest")[..., 1:65, 1:65])
    m.head = nn.Module()
    m.head.forward = lambda pairs: seen.append(pairs) or 20. * torch.eye(8).repeat(3, 1)
    assert m(x) < 1e-6 and m.accuracy == 1
    assert seen[0].view(3, 8, 2)[2].tolist() == [[4, k] for k in (0, 1, 2, 3, 5, 6, 7, 8)]


# ---- what is taken out of them

def test_projection_takes_out_the_green_magenta_axis_alone():
    p = torch.rand(5, 3, 4, 4)
    q = C.no_fringes(p, "project")
    assert (q * MAGENTA).sum(1).abs().max() < 1e-6
    a = MAGENTA.view(1, 3)                                       # the paper's matrix: I - a'a / (aa')
    by_hand = torch.einsum("ij,njhw->nihw", torch.eye(3) - a.T @ a / (a @ a.T), p)
    assert torch.allclose(q, by_hand, atol=1e-6)
    grey = torch.rand(5, 1, 4, 4).expand(5, 3, 4, 4)
    assert torch.allclose(C.no_fringes(grey, "project"), grey, atol=1e-6)


def test_dropping_keeps_one_channel_and_noise_of_a_hundredth_of_its_deviation():
    torch.manual_seed(0)
    p = torch.rand(600, 3, 14, 14) * torch.tensor([1., 4., 9.]).view(3, 1, 1)
    q = C.no_fringes(p, "drop")
    kept = (p == q).all((2, 3))                                  # [600,3]
    assert (kept.sum(1) == 1).all() and (kept.float().mean(0) - 1 / 3).abs().max() < .1
    noise, std = q[~kept].view(600, 2, -1), p[kept].flatten(1).std(1)
    assert (noise.std(2) / std[:, None] - .01).abs().max() < .003        # 196 pixels: 5 sigma are 25 %
    assert noise.mean().abs() < 1e-3 and C.no_fringes(p, "keep") is p


def test_dropping_keeps_green_outside_of_training():
    """Features of an image are the same each time; the noise stays, a hundredth of a deviation."""
    p = torch.rand(50, 3, 8, 8)
    kept = (p == C.no_fringes(p, "drop", fixed=True)).all((2, 3))        # [50,3]
    assert torch.equal(kept, torch.tensor([False, True, False]).expand(50, 3))
    method, x = C.build(C.Config(colour="drop")), torch.randn(4, 3, 64, 64)
    a, b = (method.encoder.eval()(x) for _ in range(2))
    assert F.cosine_similarity(a, b).min() > .999
    a, b = (method.encoder.train().prepare(p) for _ in range(2))
    assert F.cosine_similarity(a.flatten(1), b.flatten(1)).min() < .5


@pytest.mark.parametrize("how", ["project", "drop", "keep"])
def test_patches_do_not_tell_their_brightness_or_contrast(how):
    nine, p = method(colour=how).encoder, torch.rand(7, 3, 16, 16)
    other, draws = .4 * p + torch.rand(7, 3, 1, 1), torch.get_rng_state()
    q = nine.prepare(p)
    torch.set_rng_state(draws)                                   # the same channels are dropped
    assert torch.allclose(nine.prepare(other), q, atol=.04)
    assert q.mean((2, 3)).abs().max() < 1e-5 and (q.square().mean((1, 2, 3)) - 1).abs().max() < .02
    assert C.equalise(torch.ones(1, 3, 4, 4)).abs().max() == 0
    assert torch.equal(method(colour="keep", equal=False).encoder.prepare(p), p)


def test_the_lens_shrinks_green_about_the_centre():
    """A white ring of radius 20: red and blue stay, green is 10 % smaller."""
    at = torch.arange(64) - 31.5
    radius = (at[:, None] ** 2 + at ** 2).sqrt()
    ring = (255 * (1 - (radius - 20).abs() / 3).clamp(0)).byte().expand(2, 3, 64, 64)
    fringed = C.aberrate(ring, .1)
    red, green, blue = ((c * radius).sum() / c.sum() for c in fringed[1].float())
    assert green / red == pytest.approx(.9, abs=.01) and green / blue == pytest.approx(.9, abs=.01)
    assert torch.equal(fringed[:, ::2], ring[:, ::2]) and torch.equal(C.aberrate(ring, 0.), ring)


# ---- what is left to learn

def test_starts_at_ln_8_and_patches_that_look_alike_cannot_beat_it():
    torch.manual_seed(0)
    m = method(jitter=0).eval()
    tile = torch.rand(6, 3, 22, 22)                              # repeats with the grid: nine equal patches
    assert m(normalise(tile.tile(1, 1, 3, 3)[..., :60, :60])) >= math.log(8) - 1e-6      # Jensen
    assert m.accuracy == 1 / 8
    nn.init.zeros_(m.head[-1].weight)
    nn.init.zeros_(m.head[-1].bias)
    assert m(torch.randn(6, 3, 64, 64)).item() == pytest.approx(math.log(8), abs=1e-5)


def learn(x, test, colour):
    """Eighty steps on images x. -> % of the pairs of other images that are then told right"""
    torch.manual_seed(0)
    m = method(colour=colour, patch=8, gap=3, jitter=1)
    optimizer = torch.optim.AdamW(m.parameters(), 2e-3)
    for _ in range(80):
        loss = m(normalise(x[torch.randint(len(x), (16,))]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return C.pairs_right(m, test)


def grain(n):
    """Grey noise that is the same everywhere and in all directions."""
    x = F.avg_pool2d(torch.rand(n, 1, 36, 36), 5, 1)
    return (255 * (.5 + 2 * (x - .5)).clamp(0, 1)).byte().expand(-1, 3, -1, -1)


def test_noise_without_a_lens_stays_at_chance():
    """Nothing in these images tells a place: what is right more often would be a leak of the label."""
    torch.manual_seed(0)
    sigma = 100 * (.125 * .875 / 2400) ** .5                     # of % of 2,400 pairs told by chance
    assert abs(learn(grain(400), grain(300), "keep") - 12.5) < 5 * sigma


@pytest.mark.parametrize("colour, low, high", [("keep", 60, 100), ("project", 0, 35), ("drop", 0, 16)])
def test_a_lens_tells_the_place_unless_its_colours_are_taken_out(colour, low, high):
    """87, 24 and 12 %: projected, the fringes are gone, but edges are smeared towards the lens's centre."""
    torch.manual_seed(0)
    assert low < learn(C.aberrate(grain(400), .1), C.aberrate(grain(300), .1), colour) < high


# ---- what is kept, and shown

def test_features_of_an_image_are_those_of_its_nine_patches_side_by_side():
    m, x = method().eval(), normalise(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    nine = m.encoder
    p = nine.prepare(nine.cut(x)).view(2, 9, 3, 16, 16)
    h = nine(x)
    assert nine.dim == 9 * nine.encoder.dim == h.shape[1]
    for i in range(9):
        assert torch.allclose(h.view(2, 9, -1)[:, i], nine.encoder(p[:, i]), atol=1e-5)
    for a, b in zip(nine.layers(x), nine.encoder.layers(p[:, 5]), strict=True):          # second row, third
        s = b.shape[2]
        assert a.shape[2:] == (3 * s, 3 * s)
        assert torch.allclose(a[:, :, s:2 * s, 2 * s:], b, atol=1e-5)


def test_its_file_loads_into_an_encoder_of_another_method(tmp_path):
    m = method()
    torch.save(m.encoder.state_dict(), tmp_path / "encoder.pt")
    other = load_weights(create_encoder("resnet_small", 32), tmp_path / "encoder.pt")
    assert torch.equal(other.layer3[0].conv1.weight, m.encoder.encoder.layer3[0].conv1.weight)


def test_the_picture_shows_a_patch_and_the_nearest_of_others():
    """The bank holds the query's own image: its patch, cut without jitter, is the nearest."""
    torch.manual_seed(0)
    images, m = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8), method()
    images[:2, :, 2:18, 24:40] = 255 * torch.randint(0, 2, (2, 1, 16, 16), dtype=torch.uint8)    # cell 1
    rows = C.alike({"trained": m.encoder, "untrained": m.encoder}, images[:2], images, n=4)
    assert list(rows) == ["patch 1, trained", "patch 1, untrained", "patch 2, trained", "patch 2, untrained"]
    for i, row in enumerate(rows.values()):
        assert row.shape == (5, 3, 16, 16) and torch.allclose(row[0], row[1])
        assert torch.allclose(row[0], images[i // 2, :, 2:18, 24:40] / 255, atol=1e-5)
        assert not torch.allclose(row[0], row[2], atol=.1)


def test_an_unknown_colour_is_one_line():
    with pytest.raises(SystemExit, match="--colour gray is unknown: give project, drop or keep"):
        C.main(replace(C.Config(), colour="gray"))


def test_the_lens_is_before_training_and_test_images(tmp_path, monkeypatch):
    """Green is another, red and blue are as they were."""
    seen, start = [], C.Run.start
    monkeypatch.setattr(C.Run, "start", lambda self, method, data, *more: (
        seen.append(data), start(self, method, data, *more))[1])
    for flag in ("0", ".1"):
        train("context_prediction", tmp_path, monkeypatch, "--steps", "1", "--aberration", flag, images=16)
    for x, y in zip(*((data.images, data.test_images) for data in seen), strict=True):
        assert x[:, ::2].equal(y[:, ::2]) and (x[:, 1] != y[:, 1]).flatten(1).any(1).all()
