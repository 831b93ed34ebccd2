"""InstDisc: its NCE and exact softmax by hand, Z frozen, the memory and the order in which it is used."""
import math

import pytest
import torch
import torch.nn.functional as F
from running import Lookup, load, train
from torch import nn

instdisc = load("instdisc")


def fixed(n=50, **options):
    """Features are the images' first pixels; no projector."""
    torch.manual_seed(0)
    m = instdisc.InstDisc(Lookup(12), n, dim=12, **options)
    m.projector = nn.Identity()
    return m, torch.randn(6, 3, 2, 2), torch.tensor([3, 0, 49, 7, 8, 20])


@pytest.mark.parametrize("k, value", [(4096, 9.318), (1024, 7.932)])
def test_nce_where_no_row_is_told_from_another(k, value):
    """P = 1/n everywhere: ln(1+K) + K ln(1+1/K), whatever n is."""
    for n in (50_000, 300):
        loss = instdisc.nce(torch.full((4, 1 + k), 2., dtype=torch.float64), 2. * n, n).item()
        assert loss == pytest.approx(math.log(1 + k) + k * math.log(1 + 1 / k), abs=1e-9)
        assert loss == pytest.approx(value, abs=1e-3)


def test_nce_is_a_sum_over_noise_and_a_mean_over_images():
    s, n = torch.rand(5, 4, dtype=torch.float64) + .1, 9
    by_hand = 0.
    for row in s.tolist():
        p, *rest = (v / 7. for v in row)
        by_hand -= math.log(p / (p + 3 / n)) + sum(math.log(3 / n / (q + 3 / n)) for q in rest)
    assert instdisc.nce(s, 7., n).item() == pytest.approx(by_hand / 5, rel=1e-12)


def test_the_exact_softmax_is_over_all_rows_of_the_memory():
    m, x, index = fixed()
    z = F.normalize(x.flatten(1), dim=1)
    assert m(x, index).item() == pytest.approx(F.cross_entropy(z @ m.memory.T / .1, index).item(), rel=1e-5)
    assert m(5 * x, index).item() == pytest.approx(m(x, index).item(), rel=1e-5)      # |z| = 1


def test_z_comes_from_the_first_batch_and_stays(monkeypatch):
    m, x, index = fixed(negatives=4)
    noise = torch.tensor([[1, 2, 3, 3]]).expand(6, 4)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: noise)
    z, rows = F.normalize(x.flatten(1), dim=1), m.memory[torch.cat([index[:, None], noise], 1)]
    s = ((z[:, None] * rows).sum(2) / .1).exp()                  # [B,1+K], the own row first
    first = m(x, index)
    assert m.z_n.item() == pytest.approx(50 * s.mean().item(), rel=1e-4)
    assert first.item() == pytest.approx(instdisc.nce(s, 50 * s.mean(), 50).item(), rel=1e-4)
    kept = m.z_n.clone()
    m(-x, index)
    assert m.z_n == kept and "z_n" in m.state_dict() and "memory" in m.state_dict()


def test_noise_is_drawn_from_all_images(monkeypatch):
    m, x, index = fixed(n=50, negatives=2000)
    used = []
    monkeypatch.setattr(instdisc, "nce", lambda s, z_n, n: used.append(s) or s.mean())
    m(x, index)
    s = (F.normalize(x.flatten(1), dim=1) @ m.memory.T / .1).exp()       # [B,n]
    torch.testing.assert_close(used[0][:, 0], s[torch.arange(6), index], rtol=1e-4, atol=0)
    torch.testing.assert_close(used[0][:, 1:].mean(1), s.mean(1), rtol=.25, atol=0)   # 2000 draws
    nearest = (used[0][:, 1:, None] - s[:, None]).abs().min(1).values     # [B,n]: each row is drawn by all
    assert (nearest < 1e-4 * s).all()


def test_memory_rows_move_half_way_and_are_unit_vectors():
    m, x, index = fixed()
    before = m.memory.clone()
    norms = before.norm(dim=1)
    assert norms.std() > .01 and norms.square().mean().item() == pytest.approx(1, abs=.1)
    loss = m(x, index)
    assert torch.equal(m.memory, before)                         # the loss is that of the old memory
    loss.backward()
    m.update_memory(index)
    z = F.normalize(x.flatten(1), dim=1)
    torch.testing.assert_close(m.memory[index], F.normalize(.5 * before[index] + .5 * z, dim=1))
    others = torch.ones(50, dtype=torch.bool)
    others[index] = False
    assert torch.equal(m.memory[others], before[others]) and not m.memory.requires_grad


@pytest.mark.parametrize("keep", [.9, .2])
def test_keep_is_the_share_of_the_old_feature(keep):
    m, x, index = fixed(keep=keep)
    m.memory.copy_(F.normalize(m.memory, dim=1))
    old = m.memory[index]
    m(x, index)
    m.update_memory(index)
    now, z = m.memory[index], F.normalize(x.flatten(1), dim=1)
    assert ((now * old).sum(1) > (now * z).sum(1)).all() == (keep > .5)


@pytest.mark.parametrize("negatives", [0, 5])
def test_the_proximal_term_is_the_squared_distance_to_the_memory(negatives):
    m, x, index = fixed(negatives=negatives)
    losses = []
    for m.proximal in (0., 30.):
        torch.manual_seed(1)
        losses.append(m(x, index).item())
    away = (F.normalize(x.flatten(1), dim=1) - m.memory[index]).square().sum(1).mean().item()
    assert losses[1] - losses[0] == pytest.approx(30 * away, rel=1e-4)


@pytest.mark.parametrize("negatives", ["0", "8"])
def test_a_run_has_seen_every_row_after_an_epoch(negatives, tmp_path, monkeypatch):
    m, _, _ = train("instdisc", tmp_path, monkeypatch, "--steps", "1", "--negatives", negatives)
    torch.testing.assert_close(m.memory.norm(dim=1), torch.ones(64))
