"""Barlow Twins: the loss against values known by hand, and what it cannot be."""
import pytest
import torch
from running import Lookup, load, train
from torch import nn

barlow = load("barlow_twins")


def method(dim, lam):
    m = barlow.BarlowTwins(Lookup(dim), lam=lam)
    m.projector = nn.Identity()
    return m


def images(z):                                                   # rows that Lookup reads back
    return torch.nn.functional.pad(z, (0, 3 * 64 - z.shape[1])).view(-1, 3, 8, 8)


def test_two_features_by_hand():
    """z1 = (a, b), z2 = (a, -b) with a, b of +-1, uncorrelated: C = diag(1, -1), loss (1 - -1)^2 = 4."""
    a, b = torch.tensor([1., 1, -1, -1]), torch.tensor([1., -1, 1, -1])
    loss = method(2, .3)(images(torch.stack([a, b], 1)), images(torch.stack([a, -b], 1)))
    assert loss.item() == pytest.approx(4, abs=1e-3)
    same = method(2, .3)(images(torch.stack([a, a], 1)), images(torch.stack([a, a], 1)))
    assert same.item() == pytest.approx(2 * .3, abs=1e-3)        # C is all ones: twice lam off the diagonal


def test_independent_views_cost_the_reference_value():
    """C_ij of N independent rows has variance 1/N: D + lam D^2 / N, what the bar shows."""
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 256, 128)
    expected = 128 * (1 + .05 * 128 / 256)
    assert method(128, .05)(images(z1), images(z2)).item() == pytest.approx(expected, rel=.05)


def test_scale_and_offset_of_a_feature_do_not_matter():
    z1, z2 = torch.randn(2, 64, 16, dtype=torch.float64)
    m = method(16, .01)
    loss = m(images(z1), images(z2))
    other = m(images(3 * z1 + 5), images(z2 * torch.linspace(1, 9, 16) - 2))
    assert other.item() == pytest.approx(loss.item(), rel=1e-4)


def test_the_picture_is_the_correlation_and_leaves_the_method_as_it_was():
    m = barlow.BarlowTwins(Lookup(8), hidden=16, dim=16)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    v = torch.rand(50, 3, 8, 8)
    c = barlow.correlation(m, v, v, n=64)                             # of 16 that there are
    assert c.shape == (1, 3, 16, 16) and torch.allclose(c[0, 0].diagonal(), torch.ones(16))
    assert torch.allclose(c, c.mT, atol=1e-5) and c.max() < 1.001 and c.median() < .7
    assert m.training and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_features_stay_apart_without_negatives_or_stop_gradient(tmp_path, monkeypatch):
    _, losses, log = train("barlow_twins", tmp_path, monkeypatch, "--steps", "40", "--lr", "3e-3")
    assert losses[-1] < .7 * losses[0] and log["z_std"] > .8
