"""The metrics of objects against pair counting, brute force and cases by hand."""
import itertools
import math

import pytest
import torch

from kernels.segmentation import (
    IGNORE,
    ari,
    averaged,
    blocks,
    clusters,
    compare,
    fg_ari,
    mbo,
    miou,
    scores,
    shared_pixels,
)
from kernels.toys import toys


def random_masks(seed, b=6, h=5, w=7, t=3, k=4):
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(m, (b, h, w), generator=g) for m in (k, t + 1))


def rand_index_by_pairs(p, t):
    """Every pair of pixels: together or apart in both, adjusted by the mean over all relabellings' pairs."""
    together = [(a == b, c == d) for (a, c), (b, d) in itertools.combinations(zip(p, t, strict=True), 2)]
    n = len(together)
    both, first, second = (sum(x) for x in ([a and b for a, b in together], [a for a, _ in together],
                                            [b for _, b in together]))
    expected, most = first * second / n, (first + second) / 2
    return 1. if most == expected else (both - expected) / (most - expected)


def test_shared_pixels_by_hand():
    predicted = torch.tensor([[[0, 0, 2], [2, 1, 1]]])
    truth = torch.tensor([[[0, 1, 1], [IGNORE, 3, 3]]])
    assert shared_pixels(predicted, truth)[0].tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 2, 0]]
    with pytest.raises(ValueError, match=r"alike, got \[1, 2, 3\] and \[1, 3\]"):
        shared_pixels(predicted, truth[:, 0])


@pytest.mark.parametrize("seed", range(5))
def test_ari_and_fg_ari_count_pairs(seed):
    predicted, truth = random_masks(seed)
    truth[0, 0, :3] = IGNORE
    n = shared_pixels(predicted, truth)
    for i in range(len(n)):
        p, t = predicted[i].flatten().tolist(), truth[i].flatten().tolist()
        kept = [(a, b) for a, b in zip(p, t, strict=True) if b != IGNORE]
        assert ari(n)[i].item() == pytest.approx(rand_index_by_pairs(*zip(*kept, strict=True)), abs=1e-12)
        front = [(a, b) for a, b in kept if b]
        assert fg_ari(n)[i].item() == pytest.approx(rand_index_by_pairs(*zip(*front, strict=True)), abs=1e-12)


def test_ari_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn, which nothing else here needs")
    for seed in range(20):
        predicted, truth = random_masks(seed)
        known = [metrics.adjusted_rand_score(t.flatten(), p.flatten())
                 for p, t in zip(predicted, truth, strict=True)]
        assert ari(shared_pixels(predicted, truth)).tolist() == pytest.approx(known, abs=1e-12)


def test_names_of_masks_do_not_matter_and_equal_partitions_have_1():
    _, truth = random_masks(1, k=4, t=3)
    renamed = torch.tensor([2, 0, 3, 1])[truth]
    n = shared_pixels(renamed, truth)
    for f in (ari, fg_ari, mbo, miou):
        assert f(n).tolist() == pytest.approx([1.] * 6, abs=1e-12), f.__name__
    split = renamed.clone()
    split[truth == 0] = torch.randint(4, split.shape)[truth == 0]        # background to any slot
    assert fg_ari(shared_pixels(split, truth)).tolist() == pytest.approx([1.] * 6, abs=1e-12)
    assert (mbo(shared_pixels(split, truth)) < .9).all()


def test_independent_masks_have_0_on_average():
    predicted, truth = random_masks(2, b=400, h=12, w=12)
    for f in (ari, fg_ari):
        values = f(shared_pixels(predicted, truth))
        assert abs(values.mean()) < 5 * values.std() / 20


@pytest.mark.parametrize("seed", range(5))
def test_overlaps_by_brute_force(seed):
    """Best mask of each object, and best of all assignments, with more objects than masks in some."""
    predicted, truth = random_masks(seed, t=3, k=2 + seed)
    truth[0][truth[0] == 2] = 0                                  # an object that is not there
    n = shared_pixels(predicted, truth)
    for i in range(len(n)):
        objects = [o for o in (1, 2, 3) if (truth[i] == o).any()]
        def overlap(o, k, i=i):
            a, b = truth[i] == o, predicted[i] == k
            return ((a & b).sum() / (a | b).sum()).item()
        masks = range(2 + seed)
        assert mbo(n)[i].item() == pytest.approx(
            sum(max(overlap(o, k) for k in masks) for o in objects) / len(objects), abs=1e-6)
        padded = [*masks, *[None] * len(objects)]                # None: no mask
        best = max(sum(overlap(o, k) for o, k in zip(objects, order, strict=True) if k is not None)
                   for order in itertools.permutations(padded, len(objects)))
        assert miou(n)[i].item() == pytest.approx(best / len(objects), abs=1e-6)


def test_one_mask_over_all():
    """A half, a quarter, a quarter background: IoU with everything is the share of the image."""
    truth = torch.tensor([[1, 1, 2, 0]]).repeat_interleave(2, 1)[:, None]
    n = shared_pixels(torch.zeros_like(truth), truth)
    assert mbo(n).item() == pytest.approx(3 / 8) and miou(n).item() == pytest.approx(1 / 4)
    assert ari(n).item() == fg_ari(n).item() == 0


def test_mbo_of_classes_asks_for_all_things_of_a_kind_in_one_mask():
    """Two dogs, one cat, each a quarter, under a mask of its own: perfect as objects; as classes the better
    dog alone is half of all dogs. One mask over both dogs: the other way round."""
    objects, classes = (torch.tensor([[t]]) for t in ([1, 2, 3, 0], [1, 1, 2, 0]))       # [1,1,4]
    for predicted, mbo_i, mbo_c in (([0, 1, 2, 3], 1, (.5 + 1) / 2), ([0, 0, 2, 3], (.5 + .5 + 1) / 3, 1)):
        p = torch.tensor([[predicted]])
        assert mbo(shared_pixels(p, objects)).item() == pytest.approx(mbo_i)
        assert mbo(shared_pixels(p, classes)).item() == pytest.approx(mbo_c)


def test_images_without_objects_are_left_out():
    predicted, truth = random_masks(3)
    known = scores(predicted[1:], truth[1:])
    truth[0] = 0
    assert fg_ari(shared_pixels(predicted, truth))[0].isnan()
    assert scores(predicted, truth) == pytest.approx(known)
    assert list(known) == ["ari", "fg_ari", "mbo", "miou"]
    assert all(math.isfinite(v) for v in known.values())


def test_without_any_object_nothing_is_scored():
    empty = torch.zeros(2, 4, 4)
    assert all(map(math.isnan, scores(empty, empty).values()))


def test_blocks_are_the_most_square_grid():
    four = blocks(4, 8)[0]
    assert four[0].tolist() == [0] * 4 + [1] * 4 and four[:, 0].tolist() == [0] * 4 + [2] * 4
    for k, there in ((1, 1), (2, 2), (5, 4), (6, 6), (7, 6), (9, 9)):
        assert blocks(k, 36).unique().tolist() == list(range(there))


def test_clusters_find_what_is_apart():
    where = torch.randint(3, (2, 50), generator=torch.Generator().manual_seed(0))
    h = 10 * torch.eye(3, 4)[where] + .1 * torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(1))
    found = clusters(h, 3)
    assert found.shape == (2, 3, 50) and (found.sum(1) == 1).all()
    assert ari(shared_pixels(found.argmax(1)[:, None], where[:, None])).tolist() == [1, 1]


def test_compare_scores_each_beside_the_others():
    truth = blocks(4, 8).expand(2, -1, -1)                       # 0 is background, three objects
    perfect = torch.nn.functional.one_hot(truth, 5).movedim(3, 1).float()
    rows = compare({"masks": perfect, "whole": torch.zeros(1, 8, 8)}, truth, 8)
    assert all(rows[f"{metric}, masks"] == 1 for metric in ("ari", "fg_ari", "mbo", "miou"))
    assert rows["ari, whole"] == rows["fg_ari, whole"] == 0
    assert rows["mbo, whole"] == .25 and rows["miou, whole"] == pytest.approx(.25 / 3)   # one of three has it
    assert all(rows[f"{metric}, truth averaged"] == 1 for metric in ("ari", "fg_ari", "mbo", "miou"))
    assert len(rows) == 12
    assert compare({"masks": perfect}, truth.repeat(2, 1, 1), 8)["ari, masks"] == 1      # of the first alone


def test_the_truth_averaged_knows_as_many_places_as_it_says():
    truth = torch.randint(4, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    assert averaged(truth, 8).argmax(1).equal(truth)             # all places: the truth
    left = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [IGNORE, 2, 0, 0], [IGNORE, 2, 0, 0]])[None]
    share = averaged(left, 2)                                    # [1,3,4,4], corners are the places' own
    assert share[0, :, 0, 0].tolist() == [0, 1, 0] and share[0, :, 0, 3].tolist() == [.5, .5, 0]
    assert share[0, :, 3, 0].tolist() == [0, 0, .5] and share[0, :, 3, 3].tolist() == [1, 0, 0]
    dot = torch.zeros(1, 8, 8, dtype=torch.uint8)
    dot[0, 3, 3] = 1                                             # a sixteenth of its place: lost
    assert averaged(dot, 2).argmax(1).sum() == 0


def test_a_grid_tells_toys_apart_only_where_toys_stand_on_one():
    """Why scenes for slots have jitter=1: else FG-ARI is near 1 for a cut into quarters that sees nothing."""
    for jitter, low, high in ((.22, .95, 1.), (1., .35, .6)):
        truth = toys(200, 1, objects=3, jitter=jitter, grey=True)["masks"]
        assert low < compare({"blocks": blocks(4, 32)}, truth, 32)["fg_ari, blocks"] < high
