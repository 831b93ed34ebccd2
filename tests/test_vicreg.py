"""VICReg: the three terms against values known by hand."""
import pytest
import torch
from running import Lookup, load, train
from torch import nn

vicreg = load("vicreg")


def method(dim, **options):
    m = vicreg.VICReg(Lookup(dim), **options)
    m.projector = nn.Identity()
    return m


def images(z):                                                   # rows that Lookup reads back
    return torch.nn.functional.pad(z, (0, 3 * 64 - z.shape[1])).view(-1, 3, 8, 8)


def test_a_constant_costs_25_times_99_hundredths():
    """Std of a constant is sqrt(1e-4) = .01, short of 1 by .99; the other terms are 0."""
    v = images(torch.ones(6, 4))
    assert method(4)(v, v).item() == pytest.approx(24.75, abs=1e-5)


def test_the_three_terms_by_hand():
    """z1 = (a, a), z2 = (a, 0), a = +-1 with unbiased variance 4/3. s: (0 + 1) / 2; v: (0 + 0 + 0 + .99) / 4;
    c: 2 (4/3)^2 / 2 + 0."""
    a = torch.tensor([1., 1, -1, -1])
    m = method(2)
    loss = m(images(torch.stack([a, a], 1)), images(torch.stack([a, 0 * a], 1)))
    assert [m.parts[k].item() for k in "svc"] == pytest.approx([.5, .99 / 4, 16 / 9], rel=1e-5)
    assert loss.item() == pytest.approx(25 * .5 + 25 * .99 / 4 + 16 / 9, rel=1e-5)
    assert method(2, weights=(0., 0., 2.))(images(torch.stack([a, a], 1)),
                                           images(torch.stack([a, 0 * a], 1))).item() == pytest.approx(32 / 9)


def test_the_hinge_is_on_the_deviation_and_only_below_1():
    z = torch.tensor([[.5], [-.5]])                              # unbiased variance .5, deviation .7071
    assert vicreg.spread_term(z).item() == pytest.approx(1 - (.5 + 1e-4) ** .5, abs=1e-6)
    assert vicreg.spread_term(9 * z) == 0


def test_views_may_be_turned_together_but_not_apart():
    """One orthogonal matrix for both views changes the distance not at all; for one view alone it does."""
    torch.manual_seed(0)
    z1, q = torch.randn(64, 8), torch.linalg.qr(torch.randn(8, 8)).Q
    z2, m = z1 + .1 * torch.randn(64, 8), method(8)
    m(images(z1), images(z2))
    s = m.parts["s"]
    m(images(z1 @ q), images(z2 @ q))
    assert m.parts["s"].item() == pytest.approx(s.item(), rel=1e-4)
    m(images(z1), images(z2 @ q))
    assert m.parts["s"] > 10 * s


def test_the_picture_is_the_covariance_and_leaves_the_method_as_it_was():
    m = vicreg.VICReg(Lookup(8), hidden=16, dim=16)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    v = torch.rand(50, 3, 8, 8)
    c = vicreg.covariance(m, v, n=4)
    with torch.no_grad():
        z = m.eval().projector(m.encoder(v))
    m.train()
    assert torch.allclose(c[0, 1].diagonal(), z.var(0)[:4], atol=1e-6) and c.shape == (1, 3, 4, 4)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_vicreg_projects_by_three_layers_with_batch_norm():
    """As in the paper."""
    m = load("vicreg").VICReg(Lookup(8), hidden=16, dim=12)
    layer = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(x) for x in m.projector] == 2 * layer + layer[:1]


def test_embeddings_shrink_to_a_point_without_the_variance_term(tmp_path, monkeypatch):
    """The distance of two views is least where nothing varies: v, which is then not asked for, nears 1."""
    flags = "--steps", "60", "--lr", "3e-3"
    _, _, kept = train("vicreg", tmp_path / "a", monkeypatch, *flags, images=32)
    _, losses, log = train("vicreg", tmp_path / "b", monkeypatch, *flags, "--variance", "0", images=32)
    assert log["z_std"] < .3 < .7 < kept["z_std"] and kept["v"] < .8 < .95 < log["v"] and losses[-1] < .1
