"""SimSiam: its loss, its stop-gradient, and the collapse without it."""
import pytest
import torch
from running import Lookup, load, train
from torch import nn

simsiam = load("simsiam")


def test_direction_is_minus_the_cosine():
    p, z = torch.randn(2, 40, 16, dtype=torch.float64)
    assert simsiam.direction(p, 5 * p).item() == pytest.approx(-1, abs=1e-12)
    assert simsiam.direction(p, -p).item() == pytest.approx(1, abs=1e-12)
    cosine = (p * z).sum(1) / p.norm(dim=1) / z.norm(dim=1)
    assert simsiam.direction(p, z).item() == pytest.approx(-cosine.mean().item(), abs=1e-12)


def test_heads_end_as_the_paper_has_them():
    """The projector ends in BatchNorm without weights, the predictor in a linear layer with a bias."""
    m = simsiam.SimSiam(Lookup(8), layers=3, dim=16, bottleneck=4)
    layer = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(x) for x in m.projector] == 2 * layer + layer[:2]
    assert not m.projector[-1].affine and all(x.bias is None for x in m.projector if isinstance(x, nn.Linear))
    assert [type(x) for x in m.predictor] == layer + layer[:1]
    assert m.predictor[0].weight.shape == (4, 16) and m.predictor[-1].bias is not None


def test_no_gradient_passes_the_stop():
    """Without heads both sides of a cosine are alike: the stop takes away half of the gradient."""
    torch.manual_seed(0)
    v1, v2 = torch.rand(2, 8, 3, 8, 8)
    grads = {}
    for stop in (True, False):
        m = simsiam.SimSiam(Lookup(8), stop=stop)
        m.projector, m.predictor = nn.Identity(), nn.Identity()
        m(v1, v2).backward()
        grads[stop] = m.encoder.p.grad.item()
    assert grads[True] != 0 and grads[False] == pytest.approx(2 * grads[True], rel=1e-4)


def test_collapses_without_the_stop_gradient(tmp_path, monkeypatch):
    """The loss nears its best, -1, and z its constant."""
    flags = "--steps", "40", "--lr", "3e-3"
    _, _, kept = train("simsiam", tmp_path / "a", monkeypatch, *flags)
    _, losses, log = train("simsiam", tmp_path / "b", monkeypatch, *flags, "--no-stop")
    assert losses[-1] < -.8 and log["z_std"] < .6 < .9 < kept["z_std"]
