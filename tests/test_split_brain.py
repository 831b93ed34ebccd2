"""Split-brain: neither half sees what it must tell, and both are kept."""
import math

import pytest
import torch
from running import load, train
from torch import nn

from kernels.colour import ab_bins, lab_to_rgb
from kernels.views import normalise

S = load("split_brain")
LAB = {"L": [0], "ab": [1, 2], "Lab": [0, 1, 2]}


def labs(n=4, side=32, seed=0):                                          # colours that a screen has
    g = torch.Generator().manual_seed(seed)
    middle, reach = torch.tensor([55., 0, 0]), torch.tensor([10., 12, 12])
    return middle[:, None, None] + reach[:, None, None] * (2 * torch.rand(n, 3, side, side, generator=g) - 1)


def built(variant="split", **options):
    torch.manual_seed(0)
    return S.build(S.Config(variant=variant, **options))


def start_at_zero(method):
    for head in method.heads:
        nn.init.zeros_(head[-2].weight)
        nn.init.zeros_(head[-2].bias)
    return method


# ---- the split

@pytest.mark.parametrize("training", [True, False])
def test_no_activation_of_a_half_depends_on_what_it_must_tell(training):
    """Other ab: the same bits in every layer and output of F1, others in F2; and the other way round."""
    method, lab, other = built().train(training), labs(), labs(seed=1)
    for mixed, same, changed in ((torch.cat([lab[:, :1], other[:, 1:]], 1), 0, 1),
                                 (torch.cat([other[:, :1], lab[:, 1:]], 1), 1, 0)):
        a, b = (method.encoder.parts(x) for x in (lab, mixed))
        for half, equal in ((same, True), (changed, False)):
            encoder = method.encoder.encoders[half]
            for p, q in zip(encoder.layers(a[half]), encoder.layers(b[half]), strict=True):
                assert torch.equal(p, q) == equal
            assert torch.equal(method.predict(lab)[half], method.predict(mixed)[half]) == equal


def test_the_jacobian_across_the_split_is_exactly_zero():
    method = built().eval()
    for i, seen in enumerate(method.sees):
        lab = labs().requires_grad_()
        out = method.predict(lab)[i]
        out.backward(torch.randn_like(out))
        blind = [c for c in range(3) if c not in LAB[seen]]
        assert not lab.grad[:, blind].any() and (lab.grad[:, LAB[seen]].abs().amax((0, 2, 3)) > 0).all()


def test_the_loss_of_a_half_trains_that_half_alone():
    for i in range(2):
        method = built()
        out = method.predict(labs())[i]
        S.told_loss(out, S.target(labs(side=8), method.sees[i], method.bins)).backward()
        for half in range(2):
            for module in (method.encoder.encoders[half], method.heads[half]):
                for p in module.parameters():
                    assert (p.grad is not None and p.grad.abs().sum() > 0) if half == i else p.grad is None


def test_halves_share_no_weight():
    a, b = built().encoder.encoders
    assert not {id(p) for p in a.parameters()} & {id(p) for p in b.parameters()}
    assert not torch.equal(a.conv1.weight, b.conv1.weight)


def test_kept_are_both_halves_side_by_side():
    """On an image, the features and each layer's map are those of F1, then those of F2."""
    halves, lab = built().encoder.eval(), labs()
    v, (one, two) = normalise(lab_to_rgb(lab)), halves.encoders
    zero = torch.zeros(4, 1, 32, 32)
    light, colour = torch.cat([lab[:, :1] / 100 - .5, zero, zero], 1), torch.cat([zero, lab[:, 1:] / 100], 1)
    assert halves.dim == one.dim + two.dim == 256
    assert torch.allclose(halves(v), torch.cat([one(light), two(colour)], 1), atol=1e-3)
    for got, a, b in zip(halves.layers(v), one.layers(light), two.layers(colour), strict=True):
        assert torch.allclose(got, torch.cat([a, b], 1), atol=1e-2)


def test_bf16_does_not_carry_lightness_into_colour():
    """Under autocast a 16-bit XYZ would round a and b by units, in a way that depends on L."""
    v = normalise(lab_to_rgb(labs()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(S.to_lab(v), S.to_lab(v.float())) and S.to_lab(v).dtype == torch.float32
    assert (S.to_lab(v) - labs()).abs().max() < 1e-2


# ---- what is told

def test_bins_of_known_colours():
    """sRGB red is L 53.24, a 80.09, b 67.20; grey is a = b = 0; white's L, 100, is in the last bin."""
    red, grey = [1., 0, 0], [.5, .5, .5]
    v = normalise(torch.tensor([red, grey, [1., 1, 1], [0., 0, 0]])[:, :, None, None].expand(-1, -1, 4, 4))
    lab, bins = S.to_lab(v), ab_bins()
    told = S.target(lab, "L", bins)
    assert told.shape == (4, 4, 4)
    assert bins[told[:, 2, 1]].tolist() == [[80, 70], [0, 0], [0, 0], [0, 0]]
    assert S.target(lab, "ab", bins)[:, 0, 3].tolist() == [53, 53, 99, 0]        # sRGB .5 is L 53.39


def test_each_centre_is_its_own_bin_and_each_unit_of_lightness_too():
    bins = ab_bins()
    lab = torch.cat([torch.full((1, 1, 313), 50.), bins.T[None]], 1)[..., None]
    lab[:, 1:] += torch.tensor([4.9, -4.9])[None, :, None, None]         # still in the square
    assert S.target(lab, "L", bins).flatten().tolist() == list(range(313))
    lab = torch.arange(0, 100, .25).view(1, 1, 400, 1).expand(-1, 3, -1, -1)
    assert S.target(lab, "ab", bins).flatten().tolist() == [i // 4 for i in range(400)]


def test_a_cell_is_told_by_its_mean_where_it_lies():
    """An image of two colours, left and right: the logits' map has the targets' places, and no others."""
    method = built()
    lab = torch.tensor([60., 20, 0]).view(1, 3, 1, 1).repeat(2, 1, 32, 32)
    lab[..., 12:] = torch.tensor([30., -10, 20]).view(3, 1, 1)
    lab[:, 0, :, 0::2] += 5
    lab[:, 0, :, 1::2] -= 5                                              # the cell's mean is 60 or 30
    sharp = []
    for centre, k in ((ab_bins(), 313), (None, 100)):
        at = [[20., 0], [-10., 20]] if k == 313 else [60, 30]
        i = [(centre == torch.tensor(c)).all(1).nonzero().item() for c in at] if k == 313 else at
        out = torch.full((2, k, 8, 8), -50.)
        out[:, i[0], :, :3] = 50
        out[:, i[1], :, 3:] = 50
        sharp.append(out)
    method.predict = lambda _: sharp
    assert method(normalise(lab_to_rgb(lab + .01))).item() < 1e-6        # .01: off the edge of the bin
    sharp[0] = sharp[0].flip(3)
    assert method(normalise(lab_to_rgb(lab + .01))).item() == pytest.approx(100 * 6 / 8, rel=1e-5)


# ---- the loss

@pytest.mark.parametrize("variant, value", [
    ("split", 10.3514), ("l_to_ab", 2 * 5.7462), ("ab_to_l", 2 * 4.6052)])
def test_start_values(variant, value):
    """ln 313 + ln 100 = 5.746 + 4.605 where all bins are alike; the halves weigh the same."""
    method = start_at_zero(built(variant))
    x = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    loss = method(normalise(x))
    assert loss.item() == pytest.approx(value, abs=1e-3)
    assert loss.item() == pytest.approx(sum(half.item() for half in method.losses), abs=1e-6)
    known = S.references(method, S.to_lab(normalise(x)), 8)
    assert next(iter(known.values())) == pytest.approx(value, abs=1e-3)
    assert known["without looking"] < value


def test_the_autoencoder_starts_at_half_the_mean_square():
    method = start_at_zero(built("autoencoder"))
    lab = labs() + torch.tensor([9., 5, -5]).view(3, 1, 1)
    cells = nn.functional.avg_pool2d(lab, 4)
    z = [cells[:, 0] / 100 - .5, cells[:, 1] / 100, cells[:, 2] / 100]
    by_hand = sum((c ** 2).mean().item() for c in z) / 2
    assert method(normalise(lab_to_rgb(lab))).item() == pytest.approx(2 * by_hand, rel=1e-3)
    known = S.references(method, lab, 8)
    variance = sum(c.var(correction=0).item() for c in z) / 2
    assert known == {"mean colour": pytest.approx(2 * variance, rel=1e-3)}


def test_without_looking_is_the_entropy_of_the_bins_of_each_half():
    """Cells of L 30, 30, 60, 90 and of two colours, 3 to 1."""
    method, cells = built(), torch.tensor([[30.5, 0, 0], [30.5, 0, 0], [60.5, 0, 0], [90.5, 20, 0]])
    lab = cells.T.reshape(1, 3, 2, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)
    entropy = [math.log(4) - .75 * math.log(3), 1.5 * math.log(2)]
    assert S.references(method, lab, 2)["without looking"] == pytest.approx(sum(entropy), abs=1e-6)
    twice = S.references(built("ab_to_l"), lab, 2)["without looking"]
    assert twice == pytest.approx(2 * entropy[1], abs=1e-6)
    y, logits = S.target(cells.T.reshape(1, 3, 2, 2), "ab", None), torch.full((1, 100, 2, 2), -99.)
    logits[:, [30, 60, 90]] = torch.tensor([4., 2, 2]).log().view(3, 1, 1)       # no constant does better
    assert S.told_loss(logits, y).item() == pytest.approx(entropy[1], abs=1e-6)


# ---- the variants

@pytest.mark.parametrize("variant", S.SEES)
def test_variants_see_and_tell_what_they_say_at_equal_size(variant):
    method, lab = built(variant).eval(), labs()
    told = {"L": 313, "ab": 100, "Lab": 3}
    assert method.encoder.dim == 256
    assert method.encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 256)
    for seen, part, out in zip(method.sees, method.encoder.parts(lab), method.predict(lab), strict=True):
        assert out.shape == (4, told[seen], 8, 8)
        assert part.abs().amax((0, 2, 3)).nonzero().flatten().tolist() == LAB[seen]
    assert {"split": ("L", "ab"), "l_to_ab": ("L", "L"), "ab_to_l": ("ab", "ab"),
            "autoencoder": ("Lab", "Lab")}[variant] == method.sees


def test_an_unknown_variant_is_refused():
    with pytest.raises(SystemExit, match="--variant both is unknown: give split, l_to_ab, ab_to_l, auto"):
        built("both")


@pytest.mark.parametrize("variant", ["l_to_ab", "ab_to_l", "autoencoder"])
def test_variants_learn(variant, tmp_path, monkeypatch):
    _, losses, log = train("split_brain", tmp_path, monkeypatch, "--steps", "12", "--variant", variant)
    assert losses[-1] < .97 * losses[0]
    assert log["F1"] + log["F2"] == pytest.approx(log["loss"], abs=1e-4)


@pytest.mark.parametrize("flags", ["--cell 3", "--cell 16", "--image_size 33"])
def test_the_reference_is_of_the_cells_that_are_told(flags, tmp_path, monkeypatch):
    """Of 32 pixels and strides of 8, cells of 3 are 4, of 16 are 8; of 33 pixels there are 5 x 5 places."""
    grids, references = [], S.references
    monkeypatch.setattr(S, "references", lambda m, lab, grid: grids.append(grid) or references(m, lab, grid))
    method, _, _ = train("split_brain", tmp_path, monkeypatch, "--steps", "1", *flags.split(), images=100)
    side = 33 if "33" in flags else 32
    assert [grids[0]] * 2 == [out.shape[2:] for out in method.predict(torch.zeros(1, 3, side, side))]


def test_cells_of_another_size():
    assert [out.shape[2:] for out in built(cell=8).predict(labs())] == [(4, 4)] * 2
    assert [out.shape[2:] for out in built(cell=2).predict(labs())] == [(16, 16)] * 2
    assert [out.shape[2:] for out in built(encoder="vit_micro").predict(labs())] == [(8, 8)] * 2


# ---- the picture

def test_inputs_are_centred_and_scaled():
    lab = torch.tensor([[0., -110, 110], [100, 110, -110]])[..., None, None]
    assert S.scaled(lab).flatten().tolist() == pytest.approx([-.5, -1.1, 1.1, .5, 1.1, -1.1])


def test_a_half_adds_what_it_tells_to_what_it_sees():
    """Certain of the true bin of each cell, both return the image, to half a bin."""
    lab = labs(2, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    cells, bins = lab[..., ::4, ::4], ab_bins()
    for seen, told, step in (("L", [1, 2], 5), ("ab", [0], .5)):
        out = 99 * nn.functional.one_hot(S.target(cells, seen, bins), S.TOLD[seen]).movedim(3, 1).float()
        back = S.completed(lab, out, seen, bins)
        assert torch.equal(back[:, LAB[seen]], lab[:, LAB[seen]])
        middle = nn.functional.interpolate(cells[:, told], 32, mode="bilinear")
        assert (back[:, told] - middle).abs().max() < step + .01
    assert torch.allclose(S.completed(lab, S.scaled(cells), "Lab", bins)[:, :, 2::4, 2::4].mean((2, 3)),
                          cells.mean((2, 3)), atol=1.5)


def test_an_undecided_half_tells_the_mean_of_its_bins():
    lab, bins = labs(), ab_bins()
    grey = S.completed(lab, torch.zeros(4, 313, 8, 8), "L", bins)
    assert torch.allclose(grey[:, 1:], bins.mean(0).view(1, 2, 1, 1).expand(4, -1, 32, 32), atol=1e-3)
    flat = S.completed(lab, torch.zeros(4, 100, 8, 8), "ab", bins)
    assert torch.allclose(flat[:, :1], torch.full((4, 1, 32, 32), 50.), atol=1e-3)


def test_the_picture_shows_each_half_what_it_sees():
    lab = labs()
    x = (255 * lab_to_rgb(lab)).round().byte()
    rows = S.picture(built().eval(), x)
    assert list(rows) == ["image", "L alone", "told from L", "ab alone", "told from ab"]
    assert torch.equal(rows["image"], x)
    got = S.to_lab(normalise(rows["L alone"])), S.to_lab(normalise(rows["ab alone"]))
    assert (got[0][:, 1:]).abs().max() < .1 and (got[0][:, :1] - lab[:, :1]).abs().max() < .5
    assert (got[1][:, :1] - 50).abs().max() < .1 and (got[1][:, 1:] - lab[:, 1:]).abs().max() < 2
    assert (S.to_lab(normalise(rows["told from L"]))[:, :1] - lab[:, :1]).abs().max() < 2
    assert list(S.picture(built("autoencoder"), x)) == ["image", "Lab alone", "told from Lab"]
