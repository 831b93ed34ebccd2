"""Exemplar-CNN: the distortions are the paper's, the seeds lie where something is, the losses by hand."""
import colorsys
import math

import pytest
import torch
import torch.nn.functional as F
from running import given, load, train
from torch import nn

from kernels.toys import toys
from kernels.views import normalise

E = load("exemplar_cnn")
TOYS = toys(n=100, seed=7)["images"]
COLOURS = E.principal_colours(TOYS)


def whole(x, **changed):
    """A square image [B,3,S,S] as its own patch, distorted by nothing but what is given."""
    t = E.draw(len(x), 0, 0) | {k: torch.tensor(v).float().expand(len(x), -1) for k, v in changed.items()}
    return E.distort(x, torch.full((len(x), 2), x.shape[3] / 2), x.shape[3], t, *COLOURS)


# ---- distortions

def test_magnitudes_are_the_papers_and_fill_their_ranges():
    table = {"shift": (-.2, .2), "scale": (.7, 1.4), "angle": (-20, 20), "contrast": (.5, 2),
             "power": (.25, 4), "factor": (.7, 1.4), "offset": (-.1, .1), "hue": (-.1, .1)}
    drawn = E.draw(20_000)
    assert drawn.keys() == table.keys()
    for name, (low, high) in table.items():
        t = drawn[name]
        assert low <= t.min() < low + .01 * (high - low) and high - .01 * (high - low) < t.max() <= high, name
        middle = (low * high) ** .5 if low > 0 else 0            # a factor is as often above as below
        assert abs((t > middle).float().mean(0) - .5).max() < 5 * .5 / 20_000 ** .5, name
        if t.shape[1] > 1:
            assert abs(t.T.corrcoef()[0, 1]) < .05, name         # each number is drawn for itself


def test_at_strength_0_nothing_changes_and_color_0_spares_the_places():
    drawn, still = E.draw(50, color=0.), E.draw(50, 0., 0.)
    for name in ("contrast", "power", "factor", "offset", "hue"):
        assert torch.equal(drawn[name], torch.full_like(drawn[name], name in ("contrast", "power", "factor")))
    for name in ("shift", "scale", "angle"):
        assert drawn[name].std() > 0
        assert torch.equal(still[name], torch.full_like(still[name], name == "scale"))
    assert (whole(TOYS) - TOYS / 255).abs().max() < 1e-5


def test_a_seed_is_the_crop_itself():
    centre = E.seeds(TOYS, 20)
    seed = E.distort(TOYS, centre, 20, E.draw(100, 0, 0), *COLOURS)
    for x, (cx, cy), patch in zip(TOYS, centre.int().tolist(), seed, strict=True):
        assert (patch - x[:, cy - 10:cy + 10, cx - 10:cx + 10] / 255).abs().max() < 1e-5


def test_shift_brings_in_what_lies_beside_the_seed_and_rotation_keeps_its_centre():
    x, centre, still = TOYS[:9], torch.full((9, 2), 16.), E.draw(9, 0, 0)
    right = E.cut(x, centre, 20, still | {"shift": torch.tensor([[.2, -.1]]).expand(9, 2)})      # 4 px, -2 px
    assert torch.allclose(right, x[:, :, 4:24, 10:30] / 255, atol=1e-5)
    turned = E.cut(x, centre, 20, still | {"angle": torch.full((9, 1), 90.)})
    assert torch.allclose(turned, E.cut(x, centre, 20, still).rot90(1, (2, 3)), atol=1e-5)
    half = E.cut(x, centre, 20, still | {"scale": torch.full((9, 1), 2.)})       # 40 px: 4 beyond each border
    big = F.pad(x / 255, (4, 4, 4, 4), mode="replicate")
    assert torch.allclose(half[:, :, 4:-4, 4:-4], F.avg_pool2d(big, 2)[:, :, 4:-4, 4:-4], atol=1e-5)


def test_pixels_beyond_the_border_are_mirrored_never_made_up():
    """White stays white wherever it is cut; a ramp runs back up behind its border."""
    white = torch.full((500, 3, 24, 24), 255, dtype=torch.uint8)
    corner = torch.zeros(500, 2)                                 # the worst seed: three quarters lie outside
    assert (E.cut(white, corner, 24, E.draw(500)) - 1).abs().max() < 1e-5
    ramp = torch.arange(24, dtype=torch.uint8).expand(1, 3, 24, 24)
    left = E.cut(ramp, torch.tensor([[0., 12.]]), 8, E.draw(1, 0, 0))
    assert torch.allclose(left[0, 0, 0] * 255, torch.tensor([3., 2, 1, 0, 0, 1, 2, 3]), atol=1e-3)


def test_a_whole_turn_of_the_hue_is_the_identity_and_a_third_moves_the_channels():
    assert (whole(TOYS, hue=[1.]) - TOYS / 255).abs().max() < 1e-5
    assert torch.allclose(whole(TOYS, hue=[1 / 3]), (TOYS / 255).roll(1, 1), atol=1e-5)  # red becomes green


def test_saturation_and_value_as_in_pythons_own_hsv():
    x = TOYS[:20, :, 12:16, 12:16]
    out = whole(x, power=[.5, 2.], factor=[1.3, .8], offset=[-.1, .05], hue=[.07])
    before, after = (y.movedim(1, 3).reshape(-1, 3).tolist() for y in (x / 255, out))
    for rgb, got in zip(before, after, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        s, v = min(max(s ** .5 * 1.3 - .1, 0), 1), min(max(v ** 2 * .8 + .05, 0), 1)
        assert got == pytest.approx(colorsys.hsv_to_rgb(h + .07, s, v), abs=1e-4)


def test_contrast_scales_the_principal_components_alone():
    """Axes are orthonormal and decorrelate the colours; a factor moves its own component about the mean."""
    mean, axes = COLOURS
    pixels = (TOYS / 255).movedim(1, 0).flatten(1).double()
    assert torch.allclose(axes.T @ axes, torch.eye(3), atol=1e-5)
    cov = axes.double().T @ pixels.cov() @ axes.double()
    assert (cov - cov.diag().diag()).abs().max() < 1e-5 * cov.max()
    assert torch.allclose(mean.flatten().double(), pixels.mean(1), atol=1e-5)
    x = (mean + .05 * torch.rand(8, 3, 6, 6) - .025).mul(255).byte()     # near the mean: nothing is clipped
    def components(y):
        return torch.einsum("ck,bchw->bkhw", axes, y - mean)
    before, after = components(x / 255), components(whole(x, contrast=[.5, 1., 2.]))
    assert torch.allclose(after, before * torch.tensor([.5, 1, 2]).view(3, 1, 1), atol=1e-5)


def test_distortions_stay_within_0_and_1_and_differ_from_patch_to_patch():
    x = TOYS[:1].expand(200, -1, -1, -1)
    v = E.distort(x, torch.full((200, 2), 16.), 24, E.draw(200), *COLOURS)
    assert v.shape == (200, 3, 24, 24) and v.min() >= 0 and v.max() <= 1 and v.isfinite().all()
    assert len(v.flatten(1).unique(dim=0)) == 200


# ---- seeds

def test_seeds_are_drawn_in_proportion_to_the_squared_gradient():
    """Two edges, one three times as high: nine times the patches. Where nothing changes, no patch ever."""
    x = torch.zeros(20_000, 3, 8, 32, dtype=torch.uint8)
    x[..., 4:8], x[..., 24:28] = 20, 60
    centre = E.seeds(x, 8)
    assert (centre[:, 1] == 4).all()
    gradient = torch.zeros(32)                                   # central differences of one row, squared
    for i in range(1, 31):
        gradient[i] = ((int(x[0, 0, 0, i + 1]) - int(x[0, 0, 0, i - 1])) / 2) ** 2
    weight = gradient.unfold(0, 8, 1).mean(1)                    # 25 places of the left border, 0 .. 24
    share = torch.bincount((centre[:, 0] - 4).long(), minlength=25) / 20_000
    p = weight / weight.sum()
    assert (share[weight == 0] == 0).all() and (weight == 0).sum() > 3
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt() + 1e-9).all()


def test_a_seed_lies_within_its_image_and_flat_images_have_one_too():
    x = torch.cat([TOYS, torch.full_like(TOYS, 90)])
    centre = E.seeds(x, 24)
    assert centre.min() >= 12 and centre.max() <= 20 and len(centre.unique(dim=0)) > 20


# ---- losses

def zeroed(**options):
    method = E.build(E.Config(**options))
    nn.init.zeros_(method.head[-1].weight)
    nn.init.zeros_(method.head[-1].bias)
    return method


def test_classes_start_at_ln_n():
    method = zeroed(classes=8000)
    loss = method(torch.randn(6, 3, 24, 24), torch.tensor([0, 7, 7999] * 2))
    assert loss.item() == pytest.approx(8.987, abs=1e-3)
    nn.init.constant_(method.head[-1].bias[7:8], 20.)            # sure of 7, which 2 of 6 are
    assert method(torch.randn(6, 3, 24, 24), torch.tensor([0, 7, 7999] * 2)).item() > 13
    assert method.accuracy == pytest.approx(1 / 3)


class Given(nn.Module):
    """An encoder that returns what stands in the image's first pixels."""
    dim = 4

    def forward(self, v):
        return v.flatten(1)[:, :4]


def triplet(z, margin=.5):
    method = E.ExemplarCNN(Given(), "triplet", margin=margin)
    method.head = nn.Identity()
    return method, F.pad(torch.as_tensor(z), (0, 8)).view(-1, 3, 2, 2)


@pytest.mark.parametrize("margin", [.2, .5])
def test_triplets_cost_the_margin_when_all_is_equally_far_and_nothing_when_negatives_are(margin):
    k = torch.arange(4).repeat(2)
    method, v = triplet(torch.tensor([[3., 1, 2, 5]]) * torch.rand(8, 1).add(.1), margin)
    assert method(v, k).item() == pytest.approx(margin, abs=1e-6) # collapsed: lengths do not count
    method, v = triplet(torch.eye(4).repeat(2, 1), margin)
    assert method(v, k).item() == 0 and method.accuracy == 1     # its own seed at 0, the others at 1
    method, v = triplet(torch.eye(4)[[0, 1, 2, 3, 1, 2, 3, 0]], margin)
    # Its own at 1, of the six others one at 0, five at 1.
    assert method(v, k).item() == pytest.approx((1 + margin + 5 * margin) / 6) and method.accuracy == 0
    loss, _ = E.triplets(torch.eye(8) - 1 / 8, k, margin)        # a simplex: all cosines are -1/7
    assert loss.item() == pytest.approx(margin, abs=1e-6)
    loss, _ = E.triplets(torch.randn(500, 4096), torch.arange(250).repeat(2), margin)
    assert loss.item() == pytest.approx(margin, abs=.005)        # random: all but orthogonal


def test_each_patch_of_another_seed_is_a_negative():
    """On a circle, each of 24 triplets by hand."""
    degrees, k = [0, 20, 90, 40, 50, 180], [0, 1, 2, 0, 1, 2]
    def d(i, j):
        return 1 - math.cos(math.radians(degrees[i] - degrees[j]))
    costs = [max(0, d(i, (i + 3) % 6) - d(i, j) + .5) for i in range(6) for j in range(6) if k[i] != k[j]]
    assert len(costs) == 24 and 0 in costs
    angles = torch.tensor(degrees).deg2rad()
    loss, right = E.triplets(5 * torch.stack([angles.cos(), angles.sin()], 1), torch.tensor(k), .5)
    assert loss.item() == pytest.approx(sum(costs) / 24, abs=1e-6)
    assert right.tolist() == [False] * 5 + [True]                # 180: its own is 90 away, the next 130


def test_a_seed_that_is_twice_in_a_batch_is_not_its_own_negative():
    loss, right = E.triplets(torch.eye(4)[[0, 0, 1, 0, 0, 1]], torch.tensor([5, 5, 9, 5, 5, 9]), .5)
    assert loss == 0 and right.all()


def test_the_loss_reaches_each_seed_it_compares_and_no_other():
    method = E.build(E.Config(classes=50))
    method(torch.randn(4, 3, 24, 24), torch.tensor([3, 8, 3, 8])).backward()
    grad = method.head[-1].bias.grad                             # softmax - one-hot
    assert (grad[[3, 8]] < 0).all() and (grad < 0).sum() == 2
    z = torch.randn(8, 4, requires_grad=True)
    E.triplets(z, torch.arange(4).repeat(2), .5)[0].backward()
    assert (z.grad * z).sum(1).abs().max() < 1e-6 and z.grad.abs().sum() > 0     # directions alone count


# ---- what it costs, and its flags

def test_the_classifier_grows_with_the_data_and_the_metric_form_does_not():
    for n in (1000, 8000, 32_000):
        assert E.head_parameters(E.Config(), "classes", n) == 129 * n            # 128 features and a bias
        assert E.head_parameters(E.Config(), "triplet", n) == 129 * 128


def test_distances_keep_their_precision_under_autocast():
    """In bf16, 1 - cosine would be a multiple of 1/256."""
    z, k = torch.randn(8, 64), torch.arange(4).repeat(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = E.triplets(z.bfloat16(), k, .5)
    exact, _ = E.triplets(z.bfloat16(), k, .5)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), abs=1e-6)


def test_found_counts_the_distorted_patches_that_lie_nearest_to_their_own_seed():
    seeds = TOYS[:8] / 255
    rows = torch.stack([seeds, .9 * seeds + .05, seeds.roll(1, 0), seeds], 1)    # own, another's, own
    assert E.found(nn.Flatten(), rows) == pytest.approx(66.67)


@pytest.mark.parametrize("flags, says", [(dict(loss="hinge"), "give classes or triplet"),
                                         (dict(patch=33), "give at most 32")])
def test_wrong_flags_end_in_one_line(flags, says):
    with pytest.raises(SystemExit, match=says) as stop:
        E.build(E.Config(**flags))
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("loss", ["classes", "triplet"])
def test_runs_and_draws_its_pictures(loss, tmp_path, monkeypatch, capsys):
    """Fewer images than classes: N is their number. The picture's first column is the seed itself."""
    rows = {}
    monkeypatch.setattr(E.common, "save_grid", lambda path, given: rows.update(given))
    method, losses, log = train("exemplar_cnn", tmp_path, monkeypatch, "--loss", loss, "--steps", "2")
    out = capsys.readouterr().out
    assert ("ln 64 = 4.159" if loss == "classes" else "margin = 0.500") in out
    assert "classes, 32,000 seeds: 4,128,000;" in out and "triplet, 32,000 seeds: 16,512" in out
    assert method.head[-1].out_features == (64 if loss == "classes" else 128)
    assert (next(tmp_path.glob("*/invariance.png"))).stat().st_size > 1000 and 0 < log["h_std"]
    assert [x.shape for x in rows.values()] == [(13, 3, 24, 24)] * 6
    images = toys(n=100, seed=1)["images"][:6] / 255
    for x, row in zip(images, rows.values(), strict=True):
        windows = x.unfold(1, 24, 1).unfold(2, 24, 1)            # [3,9,9,24,24]
        assert (windows - row[0][:, None, None]).abs().amax((0, 3, 4)).min() < 1e-5
        assert (row[1:] - row[0]).abs().amax((1, 2, 3)).min() > .1


def test_both_views_are_distortions_of_the_seed_that_their_label_names(tmp_path, monkeypatch):
    """Drawn twice, by the flag's strength of colour; what the encoder sees is normalised."""
    cut, strengths, distort, draw, seen = [], [], E.distort, E.draw, given(E, monkeypatch)
    monkeypatch.setattr(E, "distort", lambda x, *more: cut.append((x, distort(x, *more))) or cut[-1][1])
    monkeypatch.setattr(E, "draw", lambda n, *more: strengths.append(more[:2]) or draw(n, *more))
    train("exemplar_cnn", tmp_path, monkeypatch, "--steps", "1", "--color", ".3", images=16)
    (x, one), (again, two), (v, k) = *cut[:2], seen[0]
    images = toys(n=16)["images"]
    assert x.equal(again) and x.equal(images[k[:16]]) and k[:16].equal(k[16:]) and len(k.unique()) == 16
    assert (one != two).flatten(1).any(1).all() and v.equal(normalise(torch.cat([one, two])))
    assert strengths[:2] == 2 * [(1., .3)]
