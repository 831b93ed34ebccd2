"""Jigsaw: the orders, the tiles, that nothing but their order can be told, and what the picture shows."""
import math
from dataclasses import replace

import pytest
import torch
from running import load, train
from torch import nn

jigsaw = load("jigsaw")
ORDERS = {k: jigsaw.distant_orders(k) for k in (10, 64, 100)}


class Mean(nn.Module):
    """An encoder that says how bright a tile is."""
    dim = 1

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None]

    def layers(self, x):
        return [x.mean(1, keepdim=True)]


def method(**flags):
    torch.manual_seed(0)
    return jigsaw.build(replace(jigsaw.Config(), **flags)).eval()


def numbered(n, side=63):
    """Images whose nine cells have the brightness 0 to 8."""
    cell = torch.arange(side) // (side // 3)
    return (3. * cell[:, None] + cell).expand(n, 3, side, side)


# ---- orders

@pytest.mark.parametrize("k, least", [(10, 8), (64, 7), (100, 6), (1000, 5)])
def test_any_two_orders_differ_in_many_places(k, least):
    """A random pair differs in 8 of 9 places on average: it is the least distance that a choice can raise."""
    orders = ORDERS[k] if k < 1000 else jigsaw.distant_orders(k)
    assert orders.shape == (k, 9) and (orders.sort(1).values == torch.arange(9)).all()
    pairs = [(a != b).sum().item() for i, a in enumerate(orders[:100]) for b in orders[:i]]
    assert min(pairs) >= least == jigsaw.least_distance(orders)
    torch.manual_seed(0)
    assert jigsaw.least_distance(torch.rand(k, 9).argsort(1)) < least
    count = torch.stack([(orders == tile).sum(0) for tile in range(9)])  # [9,9], tiles and places
    assert (count - k / 9).abs().max() < 2                       # every tile comes to every place as often


def test_the_set_is_fixed_and_grows():
    """A run with more permutations has those of a smaller one first, whatever the seed."""
    torch.manual_seed(5)
    assert torch.equal(jigsaw.distant_orders(12)[:10], ORDERS[10])
    assert torch.equal(ORDERS[100][:10], ORDERS[10])


def test_an_order_says_which_tile_comes_to_a_place_and_argsort_undoes_it():
    order = ORDERS[64][5:7]
    x = 10 * torch.arange(9).expand(2, 9)
    assert torch.equal(jigsaw.reorder(x, order), 10 * order) and not torch.equal(order, order.argsort(1))
    assert torch.equal(jigsaw.reorder(jigsaw.reorder(x, order), order.argsort(1)), x)


# ---- tiles

@pytest.mark.parametrize("side", (63, 64))
def test_tiles_lie_in_their_cells_with_random_gaps(side):
    """Pixels that say where they are: row in red, column in green and blue. A pixel beyond 3 x 21 is cut."""
    row, col = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    x = torch.stack([row, col, col])
    tiles = jigsaw.cut(x.expand(300, 3, side, side), 16, fringe=1)
    assert tiles.shape == (300, 9, 3, 16, 16)
    for channel, cell in ((0, torch.arange(9) // 3), (1, torch.arange(9) % 3), (2, torch.arange(9) % 3)):
        first = tiles[:, :, channel].amin((2, 3)) - 21 * cell    # [300,9]
        assert first.unique().tolist() == [0, 1, 2, 3, 4, 5]     # every place in the cell, and no other
        assert abs(first.mean() - 2.5) < .2                      # so the gap is 5 on average (6 sigma)
        assert first.std(1).min() > 0                            # each tile of an image has its own
        assert torch.equal(tiles[:, :, channel].amax((2, 3)), tiles[:, :, channel].amin((2, 3)) + 15)
    off = (tiles[:, :, 1] - tiles[:, :, 2])[..., 0, 0]
    assert off.unique().tolist() == [-1, 0, 1]                   # fringe: the channels of a tile come apart
    together = jigsaw.cut(x.expand(300, 3, side, side), 16, fringe=0)
    assert torch.equal(together[:, :, 1], together[:, :, 2])
    whole = jigsaw.cut(x[None], 21, fringe=1)                    # as large as its cell: no gap and no fringe
    assert torch.equal(jigsaw.rearrange(whole, "1 (i j) c h w -> c (i h) (j w)", i=3), x[:, :63, :63])


def test_without_a_fringe_tiles_come_from_the_middle():
    x = torch.rand(2, 3, 64, 64)
    tiles = jigsaw.cut(x, 16)
    assert torch.equal(tiles[1, 0], x[1, :, 2:18, 2:18]) and torch.equal(tiles[0, 5], x[0, :, 23:39, 44:60])
    assert torch.equal(jigsaw.cut(x, 16), tiles)


def test_paper_tiles_have_64_pixels_of_85():
    with torch.device("meta"):
        m = jigsaw.build(jigsaw.Config(**jigsaw.PAPER | dict(orders=10)))
    assert (jigsaw.PAPER["image_size"] // 3, m.encoder.p, jigsaw.PAPER["orders"]) == (85, 64, 1000)
    assert (m.fc6[0].out_features, m.head[0].in_features, m.head[0].out_features) == (1024, 9216, 4096)


@pytest.mark.parametrize("flags", (dict(gap=1.), dict(orders=1), dict(orders=362_881)))
def test_impossible_puzzles_are_refused(flags):
    with pytest.raises(SystemExit, match="--gap must leave some of 21 pixels, --orders be 2 to 362880"):
        method(**flags)


def test_equalise_takes_brightness_contrast_and_tint_away():
    p = torch.rand(4, 9, 3, 16, 16)
    gain, shift = torch.rand(2, 4, 9, 3, 1, 1) + 1
    q = jigsaw.equalise(20 * p)
    assert q.mean((-2, -1)).abs().max() < 1e-5 and (q.std((-2, -1), correction=0) - 1).abs().max() < .02
    assert torch.allclose(jigsaw.equalise(20 * (gain * p + shift)), q, atol=.05)
    assert not jigsaw.equalise(torch.ones(1, 1, 3, 4, 4)).any()


@pytest.mark.parametrize("equal", (True, False))
def test_what_is_brighter_tells_nothing_unless_tiles_keep_their_brightness(equal):
    m = method(equal=equal)
    tiles, lamp = 20 * torch.rand(8, 9, 3, 16, 16), torch.rand(8, 9, 3, 1, 1)
    same = torch.allclose(m.solve(tiles * (1 + lamp) + 20 * lamp), m.solve(tiles), atol=.05)
    assert same == equal


# ---- loss

def test_the_loss_of_nine_equal_tiles_is_ln_k_at_least():
    """Nothing can be told: the mean over k of -log p_k is ln K at least, by Jensen. So it is for any tiles
    where the last layer is zero."""
    m, p = method(), torch.rand(1, 1, 3, 16, 16).expand(1, 9, 3, 16, 16)
    assert -m.solve(p).log_softmax(1).mean() >= math.log(64) - 1e-6
    nn.init.zeros_(m.head[-1].weight)
    nn.init.zeros_(m.head[-1].bias)
    assert m(torch.rand(4, 3, 64, 64)).item() == pytest.approx(4.1589, abs=1e-4)


def test_the_head_sees_tiles_in_the_order_that_is_asked_for():
    """Place j shows tile orders[k,j]; the right answer for all costs nothing."""
    m = jigsaw.Jigsaw(Mean(), ORDERS[10], 16, equal=False)
    m.fc6 = nn.Identity()
    m.head.forward = lambda h: 99. * (h[:, None].round() == m.orders).all(2)
    assert m(numbered(50)).item() < 1e-6 and m.accuracy == 1
    _, k = m.shuffle(numbered(200))
    assert k.unique().tolist() == list(range(10))


def test_a_tile_does_not_reach_the_features_of_another():
    m, p = method(), torch.rand(2, 9, 3, 16, 16)
    other = p.clone()
    other[:, 3] = torch.rand(2, 3, 16, 16)
    before, after = (m.solve(x) is not None and m.h.view(2, 9, -1) for x in (p, other))
    assert (before != after).any(2).nonzero().tolist() == [[0, 3], [1, 3]]


# ---- what is kept, and the picture

def test_nine_tiles_are_the_middles_side_by_side():
    tiles = jigsaw.NineTiles(Mean(), 16, equal=False)
    assert tiles.dim == 9 and tiles(numbered(2)).tolist() == [list(range(9))] * 2
    mosaic, = tiles.layers(numbered(2))
    assert torch.equal(mosaic, numbered(2, 48)[:, :1])


def test_the_kept_encoder_prepares_tiles_as_training_does():
    m, x = method(), torch.rand(3, 3, 64, 64)
    m.solve(jigsaw.cut(x, 16))
    assert torch.equal(m.encoder(x), m.h.reshape(3, -1)) and m.encoder.dim == m.h.shape[1] * 9
    maps = m.encoder.layers(x)[-1]                               # [3,D,6,6], of a tile 2 x 2
    assert torch.allclose(maps[..., 2:4, 4:6].mean((2, 3)), m.h.view(3, 9, -1)[:, 5], atol=1e-6)
    assert torch.allclose(m.encoder(x * torch.tensor([3, 1, .2]).view(3, 1, 1) + 1), m.encoder(x), atol=.2)


def test_the_picture_puts_tiles_together_as_the_network_says():
    """Half of the answers right, half off by one: the former show the image again, the latter do not."""
    m, x = method(equal=False), (numbered(20) * 25).byte()
    answers = []

    def solve(tiles):
        v = jigsaw.denormalise(tiles).mean((2, 3, 4)) * 255 / 25         # the tiles' numbers, in places
        k = (v[:, None].round() == m.orders).all(2).int().argmax(1)
        answers.append((k + torch.arange(len(k)) % 2) % 64)
        return torch.eye(64)[answers[-1]]
    m.solve = solve
    rows, share = jigsaw.puzzles(m, x)
    inside = [jigsaw.rearrange(rows[name], "b c (i h) (j w) -> b (i j) c h w", i=3, j=3)[..., 1:-1, 1:-1]
              .mean((2, 3, 4)).mul(255 / 25) for name in ("shuffled", "as the network says")]
    shown = torch.cat([answers[0][:10:2], answers[0][1:10:2]])
    assert share == 50 and all(len(row) == 10 for row in rows.values())
    assert torch.equal(inside[1][:5].round(), torch.arange(9.).expand(5, 9))     # solved
    assert (inside[1][5:].round() != torch.arange(9.)).any(1).all()              # not solved
    assert torch.equal(inside[0].round(), inside[1].round().gather(1, m.orders[shown]))
    assert (rows["shuffled"][..., 0] == 1).all()                 # white seams


def test_the_run_prints_the_least_distance_and_draws_the_picture(tmp_path, monkeypatch, capsys):
    _, losses, log = train("jigsaw", tmp_path, monkeypatch, "--steps", "1", "--orders", "10", images=32)
    printed = capsys.readouterr().out
    assert "10 orders of nine tiles; any two differ in 8 or more" in printed and "ln 10 = 2.303" in printed
    assert list(tmp_path.glob("*/puzzles.png")) and 1.5 < losses[0] < 4
