"""Video colorization: the pointer copies, follows, and never sees a colour."""
import math

import pytest
import torch
from running import load

from kernels.colour import lab_to_rgb

V = load("video_colorization")


def one_hot(indices, k):
    return torch.nn.functional.one_hot(torch.as_tensor(indices), k).float()


# ---- the pointer

def test_each_place_copies_shares_of_the_references_that_sum_to_one():
    """Copying the number 1 gives 1 everywhere; the targets' other places have no part in it."""
    target, reference = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 11, 7, dtype=torch.float64)
    ones = torch.ones(2, 11, 1, dtype=torch.float64)
    assert (V.attend(target, reference, ones) - 1).abs().max() < 1e-14
    shares = V.attend(target, reference, torch.eye(11, dtype=torch.float64).expand(2, -1, -1))  # A itself
    i, j = 4, 3
    by_hand = (target[1, j] @ reference[1, i]).exp() / sum((target[1, j] @ r).exp() for r in reference[1])
    assert shares[1, j, i].item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert torch.equal(V.attend(target[:, :1], reference, ones), V.attend(target, reference, ones)[:, :1])


def test_cold_it_copies_the_nearest_and_hot_the_mean():
    target, reference, labels = torch.randn(1, 9, 4), torch.randn(1, 20, 4), torch.randn(1, 20, 3)
    nearest = (target @ reference.mT).argmax(2)[0]
    assert torch.allclose(V.attend(target, reference, labels, 1e-6)[0], labels[0, nearest], atol=1e-6)
    hot = V.attend(target, reference, labels, 1e6)
    assert torch.allclose(hot, labels.mean(1, keepdim=True).expand_as(hot), atol=1e-4)


def test_constant_features_copy_the_histogram_and_cost_its_cross_entropy():
    c = torch.tensor([[[0, 0, 0, 1], [0, 0, 2, 2], [0, 1, 2, 2]]])       # 0: 5, 1: 1, 2: 2 of the references
    loss, y = V.copied_colours(torch.full((1, 3, 4, 6), .3), c, 4)
    histogram = torch.tensor([5 / 8, 1 / 8, 2 / 8, 0])
    assert torch.allclose(y, histogram.expand(1, 4, 4), atol=1e-6)
    by_hand = -(math.log(5 / 8) + math.log(1 / 8) + 2 * math.log(2 / 8)) / 4
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)


def test_one_colour_costs_nothing_and_a_colour_that_no_reference_has_a_constant():
    f = torch.randn(2, 4, 9, 5, requires_grad=True)
    c = torch.full((2, 4, 9), 3)
    assert V.copied_colours(f, c, 16)[0].item() == pytest.approx(0, abs=1e-6)
    c[:, -1] = 7
    loss, _ = V.copied_colours(f, c, 16)
    loss.backward()
    assert loss.item() == pytest.approx(6 * math.log(10), rel=1e-5) and not f.grad.any()


def test_the_loss_is_that_of_the_copied_probability_itself():
    """A pointer that is right costs 0; with a second softmax no 16 colours cost less than ln(1 + 15/e)."""
    f = 30 * torch.eye(6).expand(1, 2, 6, 6)
    c = torch.tensor([[[0, 1, 2, 3, 4, 5]] * 2])
    assert V.copied_colours(f, c, 16)[0].item() < 1e-6
    assert V.copied_colours(f, torch.stack([c[:, 0], c[:, 0].roll(1, 1)], 1), 16)[0].item() > 10


def test_the_last_frame_copies_from_all_earlier_ones():
    """Frames of five places, by hand: e^(f_i f_j) of the places i that have c_j over that of all ten."""
    torch.manual_seed(0)
    f, c = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.arange(30).view(2, 3, 5) % 5 % 3
    costs = []
    for b in range(2):
        for j in range(5):
            e = {(t, i): (f[b, t, i] @ f[b, 2, j]).exp().item() for t in (0, 1) for i in range(5)}
            costs.append(-math.log(sum(e[i] for i in e if c[b][i] == c[b, 2, j]) / sum(e.values())))
    assert V.copied_colours(f.float(), c, 3)[0].item() == pytest.approx(sum(costs) / 10, rel=1e-5)


# ---- colours

def test_the_encoder_never_sees_colour():
    """Other a and b under the same L: the same input to the encoder to the last digits, other targets."""
    torch.manual_seed(0)
    light = 45 + 10 * torch.rand(8, 1, 32, 32)
    ab = torch.randint(0, 2, (2, 8, 2, 32, 32)) * 24. - 12               # all of them are on the screen
    x = [lab_to_rgb(torch.cat([light, colour], 1)).view(2, 4, 3, 32, 32) for colour in ab]
    method = V.build(V.Config()).eval()
    method.colours.copy_(torch.randn(16, 2) * 6)
    (v, c), (w, d) = (method.prepare(clip) for clip in x)
    assert (x[0] - x[1]).abs().max() > .1 and (c != d).float().mean() > .5
    assert torch.allclose(v, w, atol=1e-3) and torch.allclose(method.embed(v), method.embed(w), atol=1e-3)
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    by_hand = (light.view(2, 4, 1, 32, 32).expand_as(v) / 100 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(v, by_hand, atol=1e-3)


def test_a_colour_is_the_nearest_of_one_vocabulary():
    """Four quarters of a frame, row by row: their means are quantised, and the checkpoint keeps the words."""
    method = V.VideoColorization(V.make_encoder(V.Config()), colours=3, grid=2)
    method.colours.copy_(torch.tensor([[0., 0.], [40., 0.], [0., -40.]]))
    ab = torch.tensor([[[30., 10.], [1., 2.]], [[3., 10.], [-30., 15.]]])            # [2,2,2]: a, b
    lab = torch.cat([torch.full((1, 2, 2), 60.), ab]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    lab[1:, :4, :4] += torch.tensor([-15., 15.]).repeat(8).view(4, 4)    # noise about the mean
    _, c = method.prepare(lab_to_rgb(lab[None])[None])
    assert c.tolist() == [[[1, 0, 2, 0]]] and method.state_dict()["colours"].shape == (3, 2)


def test_the_vocabulary_finds_the_colours_there_are():
    torch.manual_seed(0)
    true = torch.tensor([[40., 0.], [-40., 20.], [0., -45.], [10., 50.]])
    which = torch.arange(4).repeat(8)[torch.randperm(32)]
    lab = torch.cat([torch.full((32, 1), 60.), true[which]], 1)[..., None, None].expand(-1, -1, 8, 8)
    found = V.vocabulary(lab_to_rgb(lab).view(8, 4, 3, 8, 8), 4, 4)
    assert torch.cdist(true, found.float()).amin(1).max() < 1e-2


# ---- following

def shifted_clip():
    """Four frames of 4 x 4 places whose contents move a column right each frame, round the border."""
    frame = torch.arange(16).view(4, 4)
    content = torch.stack([frame.roll(t, 1).flatten() for t in range(4)])
    return content, 40 * one_hot(content, 16)[None]                      # perfect features, blind to place


def test_perfect_features_carry_a_mask_exactly_through_a_moving_clip():
    content, f = shifted_clip()
    toy = torch.isin(content, torch.tensor([1, 5, 6])).long()            # [4,16], moves as the content does
    y = V.carry(f, one_hot(toy[:1], 2), .5)
    assert torch.allclose(y[0], one_hot(toy, 2), atol=1e-6)


def test_each_frame_copies_from_the_one_before_and_from_the_first():
    """A thing that changes its look in steps is found through the frame before, a hidden one by the first."""
    a, b, ground = 9 * torch.eye(3)
    for frames in ([a, ground], [a + b, ground], [b, ground]), ([a, ground], [ground, ground], [a, ground]):
        f = torch.stack([torch.stack(frame) for frame in frames])[None]  # [1,3,2,3]
        assert torch.allclose(V.carry(f, torch.eye(2)[None], 1.)[0, 2], torch.eye(2), atol=1e-6)


@pytest.mark.parametrize("lengths, cosine, right", [(0, False, True), (1, False, False), (1, True, True)])
def test_labels_keep_their_places_and_any_label_is_carried(monkeypatch, lengths, cosine, right):
    """What lies in a row and column of the first frame is a column further right in the next. Features of
    different lengths that all lean one way mislead a dot product, not a cosine."""
    torch.manual_seed(0)
    method, (_, f) = V.VideoColorization(V.make_encoder(V.Config()), grid=4), shifted_clip()
    f = (f + 10) * (1 + torch.rand(1, 4, 16, 1)) if lengths else f
    monkeypatch.setattr(method, "embed", lambda v: f.expand(len(v), -1, -1, -1))
    labels = torch.randn(70, 3, 4, 4)
    y = V.follow(method, torch.zeros(70, 4, 3, 4, 4, dtype=torch.uint8), labels, 1e-3, cosine)
    assert y.shape == (70, 4, 3, 4, 4)                                   # more clips than go at once
    assert all(torch.allclose(y[:, t], labels.roll(t, 3), atol=1e-5) for t in range(4)) == right


# ---- J and points

def moving_toys():
    """12 x 12 pixels: toy 1, 4 x 3, goes 2 right and 1 down a frame; toy 2, 2 x 2, stays, but is hidden in
    the last frame; toy 3 comes late."""
    masks = torch.zeros(1, 4, 12, 12, dtype=torch.uint8)
    for t in range(4):
        masks[0, t, 1 + t:4 + t, 1 + 2 * t:5 + 2 * t] = 1
        masks[0, t, 9:11, 0:2] = 2 * (t < 3)
    masks[0, 2:, 0:2, 10:12] = 3
    return masks


def marks_of(masks, moved):
    """Marks as a perfect pointer would carry them: each pixel's toy, and the place it was at."""
    toy = one_hot(masks.long(), 4).movedim(4, 2)
    at = V.places(12).expand(1, 4, -1, -1, -1) - torch.where(masks[:, :, None] == 1, moved, 0)
    return torch.cat([toy, at], 2)


def test_perfect_marks_score_one_and_wrong_ones_nothing():
    masks = moving_toys()
    moved = torch.arange(4).view(1, 4, 1, 1, 1) * torch.tensor([2 / 12, 1 / 12]).view(1, 1, 2, 1, 1)
    assert V.scores(marks_of(masks, moved), masks) == (1, 1)
    assert V.scores(marks_of(masks.roll(6, 2), moved), masks)[0] == 0    # half a side down: disjoint
    far = marks_of(masks, moved)
    far[:, :, -2:] += .08                                                # .113 of the side off
    assert V.scores(far, masks) == (1, 0) and V.scores(far, masks, radius=.12) == (1, 1)


def test_standing_still_scores_what_the_hand_counts():
    """Toy 1: 4 pixels of 20, then none; toy 2 stays, in two frames. Toy 3 was not marked: it counts not."""
    masks = moving_toys()
    still = V.marks(masks)
    j, points = V.scores(still[:, None].expand(-1, 4, -1, -1, -1), masks)
    assert j == pytest.approx((4 / 20 + 0 + 0 + 1 + 1) / 5, abs=1e-6)
    assert points == pytest.approx(8 / (36 + 8), abs=1e-6)


def test_marks_are_toys_and_places():
    masks = torch.tensor([[[[0, 2], [1, 1]], [[0, 3], [1, 1]]]], dtype=torch.uint8)    # toy 3 comes late
    toy, at = V.marks(masks)[0].split([4, 2])
    assert toy.tolist() == [[[1, 0], [0, 0]], [[0, 0], [1, 1]], [[0, 1], [0, 0]], [[0, 0], [0, 0]]]
    assert at.tolist() == [[[.25, .75], [.25, .75]], [[.25, .25], [.75, .75]]]


# ---- the network and its data

class Blank(torch.nn.Module):
    """An encoder that sees nothing."""
    dim = 3

    def layers(self, x):
        return [torch.zeros(len(x), 3, 5, 5), torch.zeros(len(x), 2, 2, 2)]


def test_features_know_their_place():
    method = V.VideoColorization(Blank(), grid=6)
    assert (method.places[0, :, 1, 4] * 6).tolist() == pytest.approx([3, -3])        # x, y of cell (1, 4)
    f = method.embed(torch.rand(2, 4, 3, 8, 8))
    assert f.shape == (2, 4, 36, 64) and torch.equal(f[0], f[1])
    assert torch.pdist(f[0, 0]).min() > 0 and method.h.shape == (8, 2)   # the last map's mean, a row a frame


def test_stills_of_the_table_are_grey():
    cfg = V.Config(image_size=16)
    grey, colour = V.grey_stills(cfg, 100, "cpu"), V.load_data(V.replace(cfg, data="toys:n=100"))
    assert torch.equal(grey.labels, colour.labels) and torch.equal(grey.test_labels, colour.test_labels)
    for a, b in ((grey.images, colour.images), (grey.test_images, colour.test_images)):
        assert torch.equal(a[:, :1].expand_as(a), a)
        assert (a / 2.55 - V.rgb_to_lab(b / 255)[:, :1]).abs().max() < .5 / 2.55 + 1e-3


def test_pictures_begin_with_the_truth():
    """With a place a pixel, the first frame's colours and masks are the true ones; later ones are not."""
    torch.manual_seed(0)
    toys = V.load_data(V.Config(data="toys:objects=2,frames=4,n=100", image_size=16))
    method = V.VideoColorization(V.make_encoder(V.Config(image_size=16)), grid=16)
    rows = V.picture(method, toys.images[:2], toys.masks[:2], .5)
    assert {row.shape for row in rows.values()} == {(8, 3, 16, 16)}
    grey = rows["grey, as seen"]
    assert torch.equal(grey[:, :1].expand_as(grey), grey)
    for carried, true in ("colours carried", "true colours"), ("masks carried", "true masks"):
        a, b = (rows[name] / (255 if name == "true colours" else 1) for name in (carried, true))
        assert torch.allclose(a[::4], b[::4], atol=1e-2) and not torch.allclose(a, b, atol=1e-2)


def test_stills_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="clips of four frames and more: give --data toys:frames=6"):
        V.main(V.Config(data="toys:n=100", steps=1, out=str(tmp_path)))
    with pytest.raises(SystemExit, match="clips of four frames"):
        V.main(V.Config(data="toys:n=100,frames=3", steps=1, out=str(tmp_path)))
