"""Slots against Algorithm 1 in loops, by their symmetries and gradients; decoders; what tells of failures."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.decoders import MLP, Autoregressive, Broadcast, axes, frames, orders, quadratic
from kernels.slots import COLOURS, Slots, coloured, complaints, enlarge, glorot, monitors


def slots(init="gaussian", rounds=3, **options):
    torch.manual_seed(0)
    return Slots(4, 5, 6, rounds, init=init, **options).double()


def rand(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_algorithm_1_in_loops():
    net, x, s = slots(), rand(2, 7, 5), rand(2, 4, 6, seed=2)
    out, maps = net(x, s)
    for b in range(2):
        inputs = net.norm_inputs(x[b])
        k, v = inputs @ net.to_k.weight.T, inputs @ net.to_v.weight.T
        state = s[b]
        for t in range(3):
            q = net.norm_slots(state) @ net.to_q.weight.T
            a = torch.stack([(k[n] @ q.T / 6 ** .5).softmax(0) for n in range(7)])       # [N,K], over slots
            torch.testing.assert_close(maps[t, b], a.T, rtol=1e-9, atol=1e-12)
            w = (a + 1e-8) / (a + 1e-8).sum(0)                                           # over inputs
            state = net.gru(torch.stack([w[:, i] @ v for i in range(4)]), state)
            state = state + net.mlp(state)
        torch.testing.assert_close(out[b], state, rtol=1e-9, atol=1e-12)


def test_permuted_slots_come_out_permuted_and_the_order_of_inputs_does_not_matter():
    net, x, s = slots(), rand(2, 7, 5), rand(2, 4, 6, seed=2)
    out, maps = net(x, s)
    assert torch.allclose(maps.sum(2), torch.ones(3, 2, 7, dtype=torch.float64))
    p, n = torch.tensor([2, 0, 3, 1]), torch.randperm(7)
    assert torch.allclose(net(x, s[:, p])[0], out[:, p]) and torch.allclose(net(x[:, n], s)[0], out)


def test_a_gaussian_is_shared_and_drawn_anew_and_queries_stay():
    net = slots()
    assert net.mu.shape == net.log_sigma.shape == (1, 1, 6)
    drawn = net.start(20_000).detach()                           # [20000,4,6]
    assert torch.allclose(drawn.mean((0, 1)), net.mu[0, 0], atol=.03)
    assert torch.allclose(drawn.std((0, 1)), net.log_sigma[0, 0].exp(), rtol=.03)
    net = slots("queries")
    assert torch.equal(net.start(2)[0], net.mu[0]) and torch.equal(net.start(2)[1], net.mu[0])
    with pytest.raises(ValueError, match="gaussian or queries, got zeros"):
        slots("zeros")


def test_the_bi_level_gradient_is_that_of_the_last_round_from_the_queries():
    net, x, c = slots("queries"), rand(2, 7, 5), rand(2, 4, 6, seed=3)
    (net(x)[0] * c).sum().backward()
    found = net.mu.grad.clone(), net.to_v.weight.grad.clone()
    with torch.no_grad():
        net.rounds = 2
        net.bilevel = False                                      # two plain rounds from the queries
        before, _ = net(x, net.mu.expand(2, -1, -1))
    net.rounds, last = 1, before.requires_grad_(True)
    net.zero_grad()
    (net(x, last)[0] * c).sum().backward()
    assert torch.allclose(found[0], last.grad.sum(0, keepdim=True)) and found[0].abs().sum() > 0
    assert torch.allclose(found[1], net.to_v.weight.grad)        # earlier rounds give none


def test_without_bilevel_the_queries_have_the_gradient_of_all_rounds():
    net, x, c = slots("queries", bilevel=False), rand(2, 7, 5), rand(2, 4, 6, seed=3)
    (net(x)[0] * c).sum().backward()
    first = net.mu.detach().expand(2, -1, -1).clone().requires_grad_(True)
    (net(x, first)[0] * c).sum().backward()
    assert torch.allclose(net.mu.grad, first.grad.sum(0, keepdim=True)) and not slots(bilevel=True).bilevel
    both = slots("queries")
    (both(x)[0] * c).sum().backward()
    assert torch.allclose(both(x)[0], net(x)[0]) and not torch.allclose(both.mu.grad, net.mu.grad)


def test_glorot():
    net = nn.Sequential(nn.Linear(300, 500), nn.GRUCell(8, 8))
    glorot(net)
    assert net[0].weight.std().item() == pytest.approx((2 / 800) ** .5, rel=.02) and not net[0].bias.any()
    w = net[1].weight_hh                                         # [24,8], orthonormal columns
    assert torch.allclose(w.T @ w, torch.eye(8), atol=1e-5) and not net[1].bias_hh.any()


def test_monitors_by_hand():
    won = torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]])             # [B,N]
    m = monitors(F.one_hot(won, 3).mT.float())
    assert m["used"] == 1.5 and m["largest"] == (.75 + 1) / 2
    same = F.one_hot(won[:1], 3).mT.float().expand(2, -1, -1)
    assert monitors(same)["masks_vary"] == 0


def test_complaints_name_the_failures():
    g = torch.Generator().manual_seed(0)
    good = F.one_hot(torch.randint(3, (100, 64), generator=g), 3).mT.float()
    one = F.one_hot(torch.zeros(100, 64, dtype=torch.long), 3).mT.float()
    assert not complaints(good)
    assert "one slot takes everything" in complaints(one)[0] and "places, not objects" in complaints(one)[1]
    assert len(complaints(good[:1].expand(100, -1, -1))) == 1    # stripes, the same in every image
    for k, said in (6, []), (7, ["most slots are ignored (in use: 3.00 of 7)"]):  # three win, others never
        assert complaints(F.pad(good, (0, 0, 0, k - 3))) == said


def test_masks_are_enlarged_and_coloured():
    a = torch.zeros(1, 2, 16)
    a[0, 0, :8] = a[0, 1, 8:] = 1
    segments = enlarge(a, 32).argmax(1)
    assert (segments[0, :16] == 0).all() and (segments[0, 16:] == 1).all()
    assert torch.equal(coloured(segments)[0, :, 0, 0], COLOURS[0])
    assert torch.equal(coloured(segments)[0, :, 31, 0], COLOURS[1])


# ---- decoders

def test_axes_and_quadratic():
    assert axes(2).tolist() == [[-.5, -.5], [.5, -.5], [-.5, .5], [.5, .5]]              # x first, y down
    assert quadratic(torch.tensor([2., 3.])).tolist() == [2, 3, 4, 9, 6]


@pytest.mark.parametrize("grid, up, size, border", [(8, 0, 16, 3), (16, 1, 32, 12)])
def test_broadcast_paints_around_the_centre(grid, up, size, border):
    """A centre one cell further to the right: the same picture, one cell further."""
    torch.manual_seed(0)
    net = Broadcast(6, 8, grid, up, size)
    s, centre, spread = torch.randn(1, 2, 6), torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    out, moved = net(s, centre, spread), net(s, centre + torch.tensor([2 / grid, 0]), spread)
    assert out.shape == (1, 2, 4, size, size)
    inner = slice(border, -border)                               # zeros beyond the border do not move along
    assert torch.allclose(moved.roll(-2, 4)[..., inner, inner], out[..., inner, inner], atol=1e-5)
    other = torch.cat([s[:, :1], torch.randn(1, 1, 6)], 1)
    assert torch.allclose(net(other, centre, spread)[:, 0], out[:, 0], atol=1e-6)        # each slot alone


def test_broadcast_paints_wider_where_the_slot_looks_wider():
    """Half the spread along x: what was six cells from the centre is at three; rows stay where they are."""
    torch.manual_seed(0)
    net, s, centre = Broadcast(6, 8, 16, 0, 16), torch.randn(1, 1, 6), torch.full((1, 1, 2), 1 / 16)
    out, half = (net(s, centre, torch.tensor([[[x, 1.]]])) for x in (1., .5))
    assert torch.allclose(half[..., 8 + 3], out[..., 8 + 6], atol=1e-6)  # cells from the centre
    assert not torch.allclose(half, out)
    far = net(s, centre, torch.full((1, 1, 2), .1))[0, 0]        # beyond four spreads: as four
    assert torch.equal(far[:, :4, :4], far[:, :1, :1].expand(4, 4, 4))


def test_mlp_mixes_each_slots_features_by_masks():
    torch.manual_seed(0)
    net, s = MLP(6, 5, 9, 16), torch.randn(2, 4, 6)
    told, masks = net(s)
    assert told.shape == (2, 9, 5) and torch.allclose(masks.sum(1), torch.ones(2, 9))
    alone = torch.stack([net.layers(s[1, i] + net.positions[0, 0])[..., :5] for i in range(4)])  # [K,N,C]
    assert torch.allclose(told[1], (alone * masks[1, :, :, None]).sum(0), atol=1e-6)


def test_mlp_counts_in_the_slots_frame_where_relative():
    """A centre one cell of four to the right: the same, one cell further; half the spread: as from twice as
    far."""
    torch.manual_seed(0)
    net, s = MLP(6, 5, 16, 16, relative=True), torch.randn(2, 4, 6)
    centre, spread = torch.zeros(2, 4, 2), torch.ones(2, 4, 2)
    with torch.no_grad():
        net.positions.zero_()                                    # what is left moves along with the centre

    def told(*frame):
        return net(s, frame=frame)[0].unflatten(1, (4, 4))       # [2,4,4,C]
    at, moved = told(centre, spread), told(centre + torch.tensor([.5, 0.]), spread)
    assert torch.allclose(moved[:, :, 1:], at[:, :, :-1], atol=1e-6) and not torch.allclose(moved, at)
    far, near = told(centre + .25, spread), told(centre + .25, spread * torch.tensor([.5, 1.]))
    assert torch.allclose(near[:, :, 1], far[:, :, 0], atol=1e-6)        # at -.25 as at -.75: from .25
    assert not torch.allclose(near, far)


def test_frames():
    a = torch.zeros(1, 2, 16)
    a[0, 0, 5] = a[0, 0, 6] = 1                                  # row 1, columns 1 and 2 of four
    centre, spread = frames(a)
    assert torch.allclose(centre, torch.tensor([[[0, -.25], [0, 0]]]), atol=1e-4)        # nothing: the middle
    want = torch.tensor([[[.0625, 0], [.3125, .3125]]])          # places at -.75, -.25, .25, .75
    assert torch.allclose(spread.square(), want + .01, atol=1e-4)
    one = torch.eye(256)[None]                                   # each slot looks at one place of 16 x 16
    with torch.autocast("cpu", torch.bfloat16):                  # rounding must not move, widen or narrow it
        low = frames(one)
    assert all(map(torch.equal, low, frames(one)))


def test_nine_orders():
    o = orders(8)
    assert o.shape == (9, 64) and all(sorted(row.tolist()) == list(range(64)) for row in o)
    assert len({tuple(row.tolist()) for row in o}) == 9 and o[0].tolist() == list(range(64))
    assert sorted(o[:8, 0].tolist()) == [0, 0, 7, 7, 56, 56, 63, 63]     # each corner twice
    y, x = o[8] // 8, o[8] % 8
    assert ((y.diff().abs() + x.diff().abs()) == 1).all() and o[8, 0] in (27, 28, 35, 36)        # a path, out


@pytest.mark.parametrize("order", [0, 5, 8])
def test_a_patch_is_told_from_those_before_it(order):
    torch.manual_seed(0)
    net, s, h = Autoregressive(6, 8, 16, 2, 2).double(), rand(1, 3, 6), rand(1, 16, 8)
    told, masks = net(s, h, order)
    assert torch.allclose(masks.sum(1), torch.ones(1, 16, dtype=torch.float64))
    i = net.orders[order]
    for j in (0, 7, 15):
        other = h.clone()
        other[0, i[j]] += 1
        new, new_masks = net(s, other, order)
        same = torch.isclose(new, told).all(2)[0][i]             # in the order of the patches
        assert same[:j + 1].all() and not same[j + 1:].any()
        assert torch.isclose(new_masks, masks).all(1)[0][i][:j + 1].all()


@torch.no_grad()
def test_the_autoregressive_decoder_by_hand():
    """Two blocks of two heads, patch by patch: attention to those so far, to the slots, MLP, residuals. The
    masks are where the last block looks, the mean of its heads."""
    torch.manual_seed(0)
    net = Autoregressive(6, 8, 4, depth=2, heads=2).double().eval()
    for p in net.parameters():
        p.add_(.1 * torch.randn_like(p))
    s, h, order = rand(3, 6), rand(4, 8, seed=2), net.orders[5].tolist()
    x = net.project(torch.stack([net.first[5], *[h[i] for i in order[:-1]]]))            # [4,8]
    memory = net.memory(s)                                                               # [3,8]

    def look(q, k, v, seen):                                     # [8], [M,8] twice -> [8], [2,M]
        out, maps = [], []
        for part in (slice(0, 4), slice(4, 8)):
            a = (k[:seen, part] @ q[part] / 2).softmax(0)
            out.append(a @ v[:seen, part])
            maps.append(a)
        return torch.cat(out), torch.stack(maps)

    for block in net.blocks:
        y, rows = x.clone(), []
        q, k, v = block.qkv(block.norms[0](x)).split(8, 1)
        for i in range(4):
            y[i] = x[i] + block.out(look(q[i], k, v, i + 1)[0])
            k2, v2 = block.kv(memory).split(8, 1)
            told, a = look(block.q(block.norms[1](y[i])), k2, v2, 3)
            y[i] = y[i] + block.out_cross(told)
            y[i] = y[i] + block.mlp(block.norms[2](y[i]))
            rows.append(a.mean(0))
        x = y
    out, masks = net(s[None], h[None], 5)
    for i, patch in enumerate(order):
        torch.testing.assert_close(out[0, patch], net.norm(x[i]))
        torch.testing.assert_close(masks[0, :, patch], rows[i])


def test_each_order_has_a_start_of_its_own_and_slots_have_none():
    torch.manual_seed(0)
    net, s, h = Autoregressive(6, 8, 16, 2, 2).double(), rand(1, 3, 6), rand(1, 16, 8)
    before = [net(s, h, order)[0] for order in (0, 4)]
    net.first.data[4] += 1
    after = [net(s, h, order)[0] for order in (0, 4)]
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])
    told, masks = net(s, h)
    new, new_masks = net(s[:, [2, 0, 1]], h)
    assert torch.allclose(new, told) and torch.allclose(new_masks, masks[:, [2, 0, 1]])


def test_parallel_tells_every_patch_from_the_slots_alone():
    torch.manual_seed(0)
    net, s = Autoregressive(6, 8, 16, 2, 2, parallel=True).double(), rand(1, 3, 6)
    told, _ = net(s, rand(1, 16, 8))
    assert torch.equal(net(s, rand(1, 16, 8, seed=9))[0], told)
    assert not torch.allclose(net(s + 1, rand(1, 16, 8))[0], told)
    assert torch.allclose(net(s, rand(1, 16, 8), order=5)[0], told)      # an order of equals changes nothing
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(told[0], 2))
