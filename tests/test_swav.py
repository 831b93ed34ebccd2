"""SwAV: its codes, the swapped loss over all views, its queue, what keeps it from collapse, its picture."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from running import Lookup, load, train
from torch import nn

swav = load("swav")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bare(dim=8, prototypes=5, **options):
    """z is what stands in the image's first pixels, normalised."""
    torch.manual_seed(0)
    m = swav.SwAV(Lookup(dim), dim=dim, prototypes=prototypes, eps=.05, **options).double()
    m.projector = nn.Identity()
    m.normalise_prototypes()
    return m


def plain(monkeypatch):
    """PyTorch instead of Triton's interpreter, which is slow with many rows."""
    for name in ("sinkhorn", "prototype_ce_codes"):
        monkeypatch.setattr(swav, name, partial(getattr(swav, name), impl="reference"))


def official(z, old, weight, tau=.1, eps=.05):
    """Loss as the official code loops: z [V,B,P] normalised, old [2,Q,P]; exp, not the log domain."""
    s, B, loss = z @ weight.T, z.shape[1], 0
    for i in (0, 1):
        q = (torch.cat([old[i] @ weight.T, s[i]]).detach() / eps).exp().T        # [K,Q+B]
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * len(q)
            q /= q.sum(0, keepdim=True) * q.shape[1]
        q = (q * q.shape[1]).T[-B:]
        others = [v for v in range(len(z)) if v != i]
        loss += sum(-(q * (s[v] / tau).softmax(1).log()).sum(1).mean() for v in others) / len(others) / 2
    return loss


@pytest.mark.parametrize("small", [0, 3])
@pytest.mark.parametrize("queue", [0, 11])
def test_loss_and_gradient_are_those_of_the_official_loops(queue, small):
    """No gradient passes through the codes; they come from big views alone, and go to all others."""
    m = bare(queue=queue)
    m.queue.copy_(F.normalize(rand(2, queue, 8, seed=1), dim=2))
    images = rand(2 + small, 6, 3, 2, 2).requires_grad_()
    m(*images).backward()
    found, weight = images.grad.clone(), m.prototypes.weight
    again = images.detach().requires_grad_()
    z = F.normalize(again.flatten(2)[..., :8], dim=2)
    loss = official(z, m.queue, leaf := weight.detach().requires_grad_())
    loss.backward()
    assert m(*images).item() == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(found, again.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weight.grad, leaf.grad, rtol=1e-9, atol=1e-12)


def test_value_before_training(monkeypatch):
    """Isotropic z: ln K + 1/(2 D tau^2), here 6.63 for K=512, D=128, tau=.1."""
    plain(monkeypatch)
    m = bare(dim=128, prototypes=512)
    loss = m(*rand(4, 256, 3, 8, 8))
    assert loss.item() == pytest.approx(math.log(512) + 1 / (2 * 128 * .01), abs=.03)
    assert 300 < m.perplexity.item() <= 512
    v = rand(1, 256, 3, 8, 8)[0]
    assert m(v, v).item() < loss.item() - .5                     # one's own code is easier to tell


def test_a_constant_costs_ln_k_and_nothing_less():
    """Equal rows have equal codes, 1/K each, and the best prediction of those is 1/K too."""
    m, x = bare(), torch.ones(6, 3, 2, 2, dtype=torch.float64)
    assert torch.allclose(m.codes(rand(1, 5).expand(6, 5), 0), torch.full((6, 5), .2, dtype=torch.float64))
    assert m(x, x).item() > math.log(5)
    m.prototypes.weight.data.copy_(m.prototypes.weight[:1].expand(5, 8).clone())
    assert m(x, x).item() == pytest.approx(math.log(5), abs=1e-9)


def test_codes_are_balanced_over_queue_and_batch():
    """A batch of one kind shares its prototypes with a queue of others: alone it must fill them all."""
    z = F.normalize(torch.eye(8, dtype=torch.float64)[:1] + .1 * rand(6, 8), dim=1)
    alone, joint = bare(queue=0, iterations=50), bare(queue=90, iterations=50)
    joint.queue.copy_(F.normalize(rand(2, 90, 8, seed=2), dim=2))
    a, b = (m.codes(m.prototypes(z), 0) for m in (alone, joint))
    for q in (a, b):
        assert q.shape == (6, 5) and torch.allclose(q.sum(1), torch.ones(6, dtype=torch.float64))
    assert (a.sum(0) - 6 / 5).abs().max() < .01 and b.sum(0).max() > 3


def test_queue_is_used_only_when_full_and_by_the_prototypes_of_today():
    m, none = bare(queue=12), bare(queue=0)
    old, s = F.normalize(rand(2, 12, 8, seed=3), dim=2), m.prototypes(F.normalize(rand(6, 8), dim=1))
    m.queue[:, :11] = old[:, :11]
    assert torch.equal(m.codes(s, 1), none.codes(s, 1))
    m.queue[:, 11:] = old[:, 11:]
    before = m.codes(s, 1)
    assert (before - none.codes(s, 1)).abs().max() > .05 and (before - m.codes(s, 0)).abs().max() > .05
    m.prototypes.weight.data = m.prototypes.weight.data.roll(1, 0)
    assert (m.codes(s, 1) - before).abs().max() > .05            # other scores of the same queue


def test_newest_stand_first_in_the_queue_and_the_oldest_leave():
    m, seen = bare(queue=10), []
    for seed in range(4):
        v = rand(3, 4, 3, 2, 2, seed=seed)
        m(*v)
        m.enqueue()
        seen.insert(0, F.normalize(v[:2].flatten(2)[..., :8], dim=2))
        kept = torch.cat(seen, 1)[:, :10]
        assert torch.allclose(m.queue[:, :kept.shape[1]], kept) and m.queue[:, kept.shape[1]:].isnan().all()
    assert not m.queue.requires_grad and "queue" in m.state_dict()


def test_loop_normalises_freezes_and_crops(tmp_path, monkeypatch):
    """Unit prototypes in every step, still ones for the first half; two big views, four small ones."""
    plain(monkeypatch)
    weights, shapes, passes, drawn = [], [], [], []
    forward, views = swav.SwAV.forward, swav.views

    def spy(self, *v):
        weights.append(self.prototypes.weight.detach().clone())
        shapes.append([x.shape[-1] for x in v])
        hook = self.encoder.register_forward_hook(lambda m, x, h: passes.append(tuple(x[0].shape)))
        loss = forward(self, *v)
        hook.remove()
        return loss

    def noted(x, size=None, **options):
        drawn.append((size, options["scale"]))
        return views(x, size, **options)
    monkeypatch.setattr(swav.SwAV, "forward", spy)
    monkeypatch.setattr(swav, "views", noted)
    train("swav", tmp_path, monkeypatch, "--steps", "6", "--freeze", ".5", "--local", "4", images=32)
    assert all(torch.allclose(w.norm(dim=1), torch.ones(len(w))) for w in weights)
    moved = [(b - a).abs().max().item() for a, b in zip(weights, weights[1:], strict=False)]
    assert max(moved[:3]) < 1e-6 < 1e-4 < min(moved[3:])
    assert shapes == 6 * [[32, 32, 16, 16, 16, 16]]
    assert passes == 6 * [(64, 3, 32, 32), (128, 3, 16, 16)]
    low = swav.Config.crop_local, swav.Config.crop
    assert drawn[:6] == 2 * [(None, (low[1], 1.))] + 4 * [(16, low)]


def test_prototypes_collapse_without_sinkhorn(tmp_path, monkeypatch, capsys):
    """Nothing then keeps them in equal use: the loss falls to 0 as one prototype takes all, and it warns."""
    plain(monkeypatch)
    flags = "--steps 40 --lr 3e-3 --local 0 --image_size 16 --tau .1 --eps .03 --prototypes 64".split()
    _, kept_losses, kept = train("swav", tmp_path / "a", monkeypatch, *flags)
    assert "perplexity" not in capsys.readouterr().out
    _, losses, log = train("swav", tmp_path / "b", monkeypatch, *flags, "--iterations", "0")
    assert log["perplexity"] < 2 < 8 < kept["perplexity"] and losses[-1] < .1 < kept_losses[-1]
    assert "perplexity" in capsys.readouterr().out


def test_picture_shows_the_images_nearest_to_the_prototypes_most_used():
    m = bare(dim=3, prototypes=3).float()
    m.prototypes.weight.data.copy_(torch.eye(3))
    m.encoder.forward = lambda x: x.amax((2, 3))                 # red, green or blue
    images = torch.zeros(12, 3, 4, 4, dtype=torch.uint8)
    for i, colour in enumerate([0, 0, 1, 0, 1, 0, 2, 1, 0, 0, 0, 1]):
        images[i, colour] = 255 - i
    rows = swav.clusters(m, images, rows=2, n=3)
    assert list(rows) == ["prototype 0", "prototype 1"]
    assert all(x.shape == (3, 3, 4, 4) and x[:, k].amin() > 0 for k, x in enumerate(rows.values()))
    assert len(swav.clusters(m, images[:2], n=3)["prototype 0"]) == 2    # there are no more
