"""Context encoder: what is hidden, who sees it, what painting it costs, and who learns from which loss."""
import math

import pytest
import torch
from running import load, train
from torch import nn

C = load("context_encoder")


def method(region="random", adversarial=0., **flags):
    torch.manual_seed(0)
    return C.build(C.Config(region=region, adversarial=adversarial, **flags))


def masks(region="random", n=6, **flags):
    return C.draw_masks(C.Config(region=region, **flags), n)


# ---- regions

def test_random_regions_hide_a_quarter_and_vary():
    for side in (32, 23):
        hidden = masks(n=40, image_size=side)
        assert hidden.shape == (40, 1, side, side) and (hidden.sum((1, 2, 3)) == side ** 2 // 4).all()
        assert len(hidden.unique(dim=0)) == 40 and not torch.equal(hidden, masks(n=40, image_size=side))


def test_no_place_is_likelier_to_be_hidden():
    """Also not in the rhythm of the noise's grid, whose middles are wilder than what is interpolated."""
    torch.manual_seed(0)
    often = torch.cat([masks(n=10) for _ in range(400)]).float().mean((0, 1))
    by_phase = often.view(4, 8, 4, 8).mean((0, 2))
    assert (by_phase - .25).abs().max() < .02 and (often[4:-4, 4:-4] - .25).abs().max() < .06


def test_fewer_cells_make_larger_regions():
    """How often the right neighbour of a hidden pixel is hidden too; if each were drawn alone, .25."""
    torch.manual_seed(0)
    together = []
    for cells in (2, 4, 8):
        hidden = masks(n=200, cells=cells)
        together.append((hidden[..., 1:] & hidden[..., :-1]).sum() / hidden[..., :-1].sum())
    assert together[0] > together[1] > together[2] > .5


def test_the_centre_block_is_half_a_side_less_its_border():
    by_hand = torch.zeros(32, 32, dtype=torch.bool)
    by_hand[10:22, 10:22] = True                                 # 16 in the middle are painted, 12 hidden
    assert torch.equal(masks("centre", 3), by_hand.expand(3, 1, 32, 32))
    assert masks("centre", 1, overlap=0).sum() == 16 ** 2


def test_an_unknown_region_is_refused():
    with pytest.raises(SystemExit, match="--region middle is unknown: give centre or random"):
        method("middle")


# ---- who sees what

@pytest.mark.parametrize("region", ["random", "centre"])
def test_what_is_hidden_has_no_part_in_the_painting(region):
    net, mask, v = method(region).eval(), masks(region), torch.randn(6, 3, 32, 32)
    y = net.paint(v, mask)
    assert torch.equal(net.paint(torch.where(mask, torch.randn_like(v), v), mask), y)
    seen = torch.where(mask, v, torch.randn_like(v))
    assert (net.paint(seen, mask) - y).abs().amax((1, 2, 3)).min() > 1e-4
    assert y.shape == ((6, 3, 32, 32) if region == "random" else (6, 3, 16, 16))


def test_the_hole_has_the_mean_colour():
    net, mask, v, fed = method(), masks(), torch.randn(6, 3, 32, 32), []
    net.mean.copy_(torch.tensor([.1, .5, .8]).view(1, 3, 1, 1))
    layers = net.encoder.layers
    net.encoder.layers = lambda v: fed.append(v) or layers(v)
    net.paint(v, mask)
    by_hand = torch.tensor([.1, .5, .8]).view(3, 1, 1).expand(6, 3, 32, 32)
    assert torch.equal(fed[0], torch.where(mask, by_hand, v))


@pytest.mark.parametrize("region", ["random", "centre"])
def test_the_composite_is_the_image_outside_the_hole_and_the_painting_inside(region):
    net, mask, v = method(region).eval(), masks(region), torch.randn(6, 3, 32, 32)
    filled, y, hidden = C.fills(net, v, mask)["hole"], net.paint(v, mask), mask.expand_as(v)
    assert torch.equal(filled[~hidden], v[~hidden])
    painted = torch.full_like(v, 9)
    painted[..., 8:24, 8:24] = y[..., 8:24, 8:24] if region == "random" else y
    hidden = hidden & (painted < 9)
    assert hidden.any()                                          # of random regions: those near the middle
    assert torch.allclose(2 * C.denormalise(filled)[hidden] - 1, painted[hidden], atol=1e-5)


# ---- the network

def test_channel_wise_mixes_all_places_and_no_channels():
    layer = C.channel_wise(3, 2).double()
    a = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    assert torch.equal(layer(a), a)                              # at first
    assert sum(p.numel() for p in layer.parameters()) == 3 * 2 ** 4      # m n^4
    nn.init.normal_(layer[0].weight)
    jacobian = torch.autograd.functional.jacobian(layer, torch.randn(1, 3, 2, 2, dtype=torch.float64))
    jacobian = jacobian.view(3, 4, 3, 4).transpose(1, 2)         # channels out, in, places out, in
    same = torch.eye(3, dtype=torch.bool)
    assert not jacobian[~same].any() and (jacobian[same].abs() > 1e-6).all()


def test_only_the_channel_wise_layer_reaches_the_far_corner():
    net, a = method().eval(), torch.randn(1, 128, 4, 4)
    b = a.clone()
    b[..., 0, 0] += 1
    for reached in (False, True):
        far = [net.decoder(maps)[..., -8:, -8:] for maps in (a, b)]
        assert torch.equal(*far) != reached
        nn.init.normal_(net.decoder[0][0].weight)                   # at first it is the identity


# ---- what it costs

def pixels(*shape):
    """Normalised images, and their colours in -1..1."""
    x = torch.rand(shape)
    return C.normalise(x), 2 * x - 1


def test_the_border_seen_weighs_ten_times_and_all_of_the_block_counts():
    net, mask, (v, t) = method("centre"), masks("centre", 2), pixels(2, 3, 32, 32)
    weight = torch.full((16, 16), 10.)
    weight[2:14, 2:14] = 1                                       # 12 x 12 hidden, 2 pixels seen around
    y, t = torch.randn(2, 3, 16, 16, requires_grad=True), t[..., 8:24, 8:24]
    loss = net.reconstruction(y, v, mask)
    loss.backward()
    assert loss.item() == pytest.approx((weight * (y - t) ** 2).mean().item(), rel=1e-5)
    assert torch.allclose(y.grad, 2 * weight * (y - t).detach() / (2 * 3 * 16 * 16), rtol=1e-3, atol=1e-7)


def test_random_regions_cost_their_own_mean_square_and_nothing_else():
    net, mask, (v, t) = method(), masks(n=2), pixels(2, 3, 32, 32)
    y = torch.randn(2, 3, 32, 32, requires_grad=True)
    loss = net.reconstruction(y, v, mask)
    loss.backward()
    hidden = mask.expand_as(v)
    assert loss.item() == pytest.approx((y - t)[hidden].square().mean().item(), rel=1e-5)
    assert not y.grad[~hidden].any() and y.grad[hidden].all()


def test_border_fill_continues_what_is_straight():
    """A ramp is its neighbours' mean everywhere: it comes back. So does a constant, from any region."""
    i = torch.arange(32.)
    ramp = (i + 2 * i[:, None] + torch.arange(3.)[:, None, None])[None] / 100
    assert torch.allclose(C.border_fill(ramp, masks("centre", 1)), ramp, atol=1e-4)
    mask, v = masks(n=4), torch.rand(4, 3, 32, 32)
    hidden, filled = mask.expand_as(v), C.border_fill(v, mask)
    assert torch.equal(filled[~hidden], v[~hidden]) and (filled[hidden] != v[hidden]).float().mean() > .99
    flat = torch.rand(4, 3, 1, 1).expand_as(v)
    assert torch.allclose(C.border_fill(flat, mask), flat, atol=1e-3)


def test_scores_are_errors_in_the_hole_alone():
    net, mask, (v, _) = method(), masks(), pixels(6, 3, 32, 32)
    v = torch.where(mask, C.normalise(torch.full_like(v, .75)), v)
    net.mean.copy_(C.normalise(torch.full((1, 3, 1, 1), .5)))
    net.paint = lambda v, mask: torch.full_like(v, .7)           # .85 in 0..1
    figures = C.scores(net, v, mask)
    assert figures["hole_mse"] == pytest.approx(.2 ** 2, rel=1e-3)       # .1 in 0..1 is .2 in -1..1
    assert figures["mean_colour_mse"] == pytest.approx(.5 ** 2, rel=1e-3)
    net.paint = lambda v, mask: net.target(v)
    assert C.scores(net, v, mask)["hole_mse"] < 1e-10


@pytest.mark.parametrize("region", ["random", "centre"])
def test_the_reference_is_the_loss_of_painting_the_mean_colour(region, tmp_path, monkeypatch):
    flags, seen = ("--region", region, "--overlap", "0"), []
    monkeypatch.setattr(C.Run, "start", lambda self, method, data, reference, *_: seen.append(
        (method, data, reference)) or exit())
    with pytest.raises(SystemExit):
        train("context_encoder", tmp_path, monkeypatch, *flags, images=2000)
    (net, data, reference), = seen
    t = data.test_images / 127.5 - 1
    t = t[..., 8:24, 8:24] if region == "centre" else t
    variance = (t - 2 * C.denormalise(net.mean) + 1).square().mean().item()
    assert reference["mean colour"] == pytest.approx(variance, rel=.05 if region == "random" else 1e-4)


# ---- the discriminator

@pytest.mark.parametrize("region, side", [("random", 32), ("centre", 16)])
def test_discriminator_starts_at_ln_2_and_never_sees_the_context(region, side):
    net, seen, (v, t) = method(region, .001), [], pixels(6, 3, 32, 32)
    nn.init.zeros_(net.discriminator[-1].weight)
    nn.init.zeros_(net.discriminator[-1].bias)
    net.discriminator[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss = net(v, masks(region))
    assert net.d_loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert loss.item() == pytest.approx(.999 * net.parts["l2"].item() + .001 * math.log(2), abs=1e-6)
    edge, y = (32 - side) // 2, seen[0]
    assert y.shape == (6, 3, side, side) and len(seen) == 3
    assert torch.allclose(seen[1], t[..., edge:32 - edge, edge:32 - edge], atol=1e-5)
    assert torch.equal(seen[2], y) and y.requires_grad and not seen[2].requires_grad


def test_each_side_learns_from_its_own_loss():
    net = method("centre", .5)
    loss = net(torch.randn(6, 3, 32, 32), masks("centre"))
    painter = [*net.encoder.parameters(), *net.decoder.parameters()]
    critic = list(net.discriminator.parameters())
    assert len(painter) + len(critic) == len(list(net.parameters()))
    loss.backward()
    assert all(p.grad is None for p in critic) and all(p.grad.abs().sum() > 0 for p in painter)
    before = [p.grad.clone() for p in painter]
    net.d_loss.backward()
    assert all(torch.equal(p.grad, old) for p, old in zip(painter, before, strict=True))
    assert all(p.grad.abs().sum() > 0 for p in critic)


def test_painter_and_discriminator_pull_d_of_y_in_opposite_directions():
    net, (v, _) = method("centre", 1.).double(), pixels(8, 3, 32, 32)
    y = (.1 * torch.randn(8, 3, 16, 16)).double().requires_grad_()
    net.paint = lambda *_: y
    net(v.double(), masks("centre", 8)).backward()               # weight 1: nothing but the adversarial loss
    with torch.no_grad():
        assert net.discriminator(y - 1e-2 * y.grad / y.grad.norm()).mean() > net.discriminator(y).mean()
    net.d_loss.backward()
    with torch.no_grad():
        before = net.discriminator(y).mean() - net.discriminator(net.target(v.double())).mean()
        for p in net.discriminator.parameters():
            p.sub_(1e-3 * p.grad)
        after = net.discriminator(y).mean() - net.discriminator(net.target(v.double())).mean()
    assert after < before


@pytest.mark.parametrize("region", ["random", "centre"])
def test_both_optimizers_step_and_are_saved(region, tmp_path, monkeypatch):
    flags = "--steps", "2", "--region", region, "--adversarial", ".001", "--warmup", "0"
    net, losses, log = train("context_encoder", tmp_path, monkeypatch, *flags, images=16)
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    state = torch.load(next(tmp_path.rglob("checkpoint.pt")), weights_only=True)
    painter, critic = state["optimizers"]
    assert len(critic["state"]) == len(list(net.discriminator.parameters()))
    assert len(painter["state"]) + len(critic["state"]) == len(list(net.parameters()))
    assert critic["param_groups"][0]["lr"] == pytest.approx(painter["param_groups"][0]["lr"] / 10)
    assert {s["step"].item() for o in state["optimizers"] for s in o["state"].values()} == {2}
    assert log["d_loss"] > 0 and losses[-1] == pytest.approx(.999 * log["l2"], abs=.01)


def test_both_optimizers_go_on_as_in_a_run_that_was_never_stopped(tmp_path, monkeypatch):
    flags = "--steps", "4", "--adversarial", ".1", "--warmup", "0"
    whole, _, _ = train("context_encoder", tmp_path / "whole", monkeypatch, *flags, images=16)
    train("context_encoder", tmp_path, monkeypatch, *flags, images=16, stop=2)
    again, losses, _ = train("context_encoder", tmp_path, monkeypatch, *flags, "--resume", images=16)
    assert len(losses) == 2
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_without_its_weight_no_discriminator_and_the_mean_colour_is_the_data_s(tmp_path, monkeypatch):
    flags = "--adversarial", "0", "--steps", "1"
    net, losses, log = train("context_encoder", tmp_path, monkeypatch, *flags, images=16)
    assert not list(net.discriminator.parameters()) and "d_loss" not in log
    by_hand = (C.load_data(C.Config(data="toys:n=16")).images / 255.).mean((0, 2, 3))
    assert torch.allclose(C.denormalise(net.mean).flatten(), by_hand, atol=1e-4)


# ---- the picture

def test_the_picture_shows_holes_paintings_and_the_truth():
    net, (v, t) = method(), pixels(4, 3, 32, 32)
    rows = C.picture(net, v, {"random": masks(n=4), "centre": masks("centre", 4, overlap=0)})
    assert list(rows) == [f"{name}: {row}" for name in ("random", "centre")
                          for row in ("seen", "smoothest", "painted")] + ["truth"]
    assert torch.allclose(rows["truth"], (t + 1) / 2, atol=1e-5)
    block = rows["centre: seen"][..., 8:24, 8:24]
    assert torch.allclose(block, C.denormalise(net.mean).expand_as(block))
    for name in ("centre: seen", "centre: smoothest", "centre: painted"):
        edge = rows[name].clone()
        edge[..., 8:24, 8:24] = rows["truth"][..., 8:24, 8:24]
        assert torch.equal(edge, rows["truth"]) and not torch.equal(rows[name], edge)
    assert not torch.allclose(rows["centre: seen"], rows["centre: painted"], atol=1e-2)
