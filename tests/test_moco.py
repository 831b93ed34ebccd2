"""MoCo: its losses by hand, the queue, groups of BatchNorm and their leak, the teacher, version 3."""
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from running import Lookup, load, train
from torch import nn

moco = load("moco")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Not in Triton's interpreter, which is slow; tests/test_info_nce.py holds it against this reference."""
    monkeypatch.setattr(moco, "info_nce", partial(moco.info_nce, impl="reference"))


def bare(dim, **options):
    """The images' first pixels are the projections."""
    method = moco.MoCo(Lookup(dim), dim=dim, **options)
    method.projector, method.teacher = nn.Identity(), nn.Sequential(method.encoder)
    return method


def images(z):                                                   # [B,P] -> [B,3,1,P], found by Lookup
    return F.pad(z, (0, 2 * z.shape[1])).view(len(z), 3, 1, -1)


class GroupMean(nn.Module):
    """The leak of BatchNorm, and nothing else: every image of a batch becomes the batch's mean."""
    def __init__(self, dim):
        super().__init__()
        self.dim, self.p = dim, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (x.flatten(1)[:, :self.dim].mean(0) + self.p).expand(len(x), -1)


def test_loss_by_hand():
    """Eq. 1: the own key among 1 + K; the keys of the other rows are no negatives."""
    torch.manual_seed(0)
    method = bare(5, queue=7, tau=.3)
    v1, v2 = torch.randn(2, 6, 5)
    q, k, losses = F.normalize(v1, dim=1), F.normalize(v2, dim=1), []
    for i in range(6):
        s = [(q[i] @ k[i]).item() / .3] + [(q[i] @ key).item() / .3 for key in method.queue]
        losses.append(math.log(sum(map(math.exp, s))) - s[0])
    assert method(images(v1), images(3 * v2)).item() == pytest.approx(sum(losses) / 6, rel=1e-5)


@pytest.mark.parametrize("tau, equal, independent", [(.1, .243, 8.71), (.2, 3.44, 8.416)])
def test_value_before_training(tau, equal, independent):
    """A random queue, K = 4096, P = 128. Independent rows: ln(K+1) + 1/(2 P tau^2), spread of the positive
    aside; q = k: ln(1 + K exp(-1/tau + 1/(2 P tau^2))), low."""
    torch.manual_seed(0)
    method = bare(128, queue=4096, tau=tau)
    v1, v2 = images(torch.randn(512, 128)), images(torch.randn(512, 128))
    assert method(v1, v1).item() == pytest.approx(equal, abs=.03)
    assert method(v1, v2).item() == pytest.approx(independent, abs=4 / (tau * (128 * 512) ** .5))


def test_the_queue_is_first_in_first_out():
    """Random unit rows at first; the newest keys in front; K need be no multiple of B."""
    method = bare(4, queue=10)
    first = method.queue.clone()
    assert torch.allclose(first.norm(dim=1), torch.ones(10)) and first.unique(dim=0).shape == (10, 4)
    a, b, c = torch.randn(3, 4, 4)
    method.enqueue(a)
    assert torch.equal(method.queue, torch.cat([a, first[:6]]))
    method.enqueue(b)
    method.enqueue(c)
    assert torch.equal(method.queue, torch.cat([c, b, a[:2]]))
    assert "queue" in method.state_dict()                        # a resumed run goes on with it


def test_the_queue_takes_the_keys_of_all_processes():
    method = bare(4, queue=6, gather=lambda z: torch.cat([z, -z]))
    k = torch.randn(2, 4)
    method.enqueue(k)
    assert torch.equal(method.queue[:4], torch.cat([k, -k])) and len(method.queue) == 6


def test_order_of_a_step(tmp_path, monkeypatch):
    """Teacher, loss with the old queue, optimizer, and only then this step's keys into the queue."""
    calls, queues = [], []

    def spy(cls, name):
        original = getattr(cls, name)

        def wrapper(self, *args, **kwargs):
            if name == "forward":
                queues.append(self.queue.clone())
            out = original(self, *args, **kwargs)
            if name == "enqueue" and calls and calls[-1] != "enqueue":
                assert torch.equal(self.queue, torch.cat([self.k, queues[-1][:-16]]))
            calls.append(name)
            return out
        monkeypatch.setattr(cls, name, wrapper)

    for name in ("update_teacher", "forward", "enqueue"):
        spy(moco.MoCo, name)
    spy(torch.optim.AdamW, "step")
    flags = "--steps", "3", "--queue", "64", "--batch_size", "16"
    _, _, log = train("moco", tmp_path, monkeypatch, *flags)
    assert log["m"] == .99                                       # it does not rise, as in version 3
    assert calls == ["enqueue"] * 4 + ["update_teacher", "forward", "step", "enqueue"] * 3
    assert queues[0].unique(dim=0).shape == (64, 128)


def test_each_process_fills_the_queue_with_images_of_its_own(tmp_path, monkeypatch):
    """All start from one seed: without that, the gathered queue would hold each key once a process."""
    seen = []
    monkeypatch.setattr(moco.MoCo, "enqueue", lambda self, k: seen.append(k))
    for rank in range(2):
        everything = vars(moco.common) | dict(rank=lambda rank=rank: rank)
        monkeypatch.setattr(moco, "common", SimpleNamespace(**everything))
        train("moco", tmp_path / str(rank), monkeypatch, "--steps", "1", "--queue", "64")
    first, second = seen[0], seen[2]                             # each followed by the step's own
    assert first.shape == second.shape == (64, 128) and not (first[:, None] == second).all(2).any()


def test_the_loss_starts_near_ln_of_the_keys(tmp_path, monkeypatch):
    """The queue is full of keys, which untrained are much alike; random rows would give .4. There are not
    more keys than images."""
    for version in ("1", "2"):
        method, losses, _ = train("moco", tmp_path, monkeypatch, "--steps", "1", "--version", version)
        assert len(method.queue) == 64 and .85 < losses[0] / math.log(65) < 1.02


def test_teacher_is_an_average_of_weights_only():
    """theta_k <- m theta_k + (1-m) theta_q; BatchNorm's buffers are its own; no gradient goes into keys."""
    for version in (1, 2, 3):
        method = moco.build(moco.Config(version=version))
        before = [p.clone() for p in method.teacher.parameters()]
        student = list(method.encoder.parameters()) + list(method.projector.parameters())
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], .1)
        method(*torch.rand(2, 16, 3, 32, 32)).backward()
        assert not method.k.requires_grad and all(p.grad is None for p in method.teacher.parameters())
        optimizer.step()
        buffers = [b.clone() for b in method.teacher.buffers()]
        method.update_teacher(.9)
        for t, old, s in zip(method.teacher.parameters(), before, student, strict=True):
            assert torch.allclose(t, .9 * old + .1 * s, atol=1e-7)
        assert all(torch.equal(a, b) for a, b in zip(buffers, method.teacher.buffers(), strict=True))
        counts = {int(b) for n, b in method.teacher.named_buffers() if n.endswith("num_batches_tracked")}
        assert counts == {4 if version < 3 else 2}               # forwards of its own: four groups, two views


def test_keys_come_back_in_the_order_of_their_images():
    torch.manual_seed(0)
    z = torch.randn(16, 6)
    for splits in (1, 4):
        keys = bare(6, splits=splits).keys(images(z))
        assert torch.allclose(keys, F.normalize(z, dim=1)) and not keys.requires_grad


def test_shuffling_moves_keys_to_other_groups():
    """One group: the same keys to rounding. Four: an image's key depends on whom it was thrown with."""
    for splits, close in ((1, True), (4, False)):
        torch.manual_seed(0)
        method = moco.build(moco.Config(version=1, splits=splits))
        v = torch.rand(16, 3, 32, 32) * torch.linspace(.2, 1, 16).view(16, 1, 1, 1)
        shuffled = method.keys(v)
        method.shuffle = False
        plain, method.splits = method.keys(v), 1
        alone = torch.cat([method.keys(v[i:i + 4]) for i in range(0, 16, 4)])            # four groups of four
        assert torch.allclose(plain, shuffled, atol=1e-4) == close
        assert torch.allclose(plain, alone, atol=1e-5) != close


def test_queries_are_split_as_keys_are_but_not_shuffled():
    torch.manual_seed(0)
    method = moco.build(moco.Config(version=1))
    v = torch.rand(16, 3, 32, 32) * torch.linspace(.2, 1, 16).view(16, 1, 1, 1)
    method(v, v)
    groups = torch.cat([method.encoder(v[i:i + 4]) for i in range(0, 16, 4)])
    assert torch.allclose(method.h, groups, atol=1e-5)
    assert not torch.allclose(method.h, method.encoder(v), atol=1e-2)
    method.eval()(v, v)                                          # running statistics: groups change nothing
    assert torch.allclose(method.h, method.encoder(v), atol=1e-5)


def test_groups_leak_unless_the_keys_are_shuffled():
    """An encoder that sees nothing but its group knows the own key, until the keys are shuffled."""
    torch.manual_seed(0)
    v, agreement = images(torch.randn(64, 8)), {}
    for shuffle in (False, True):
        method = moco.MoCo(GroupMean(8), version=1, dim=8, splits=8, shuffle=shuffle)
        method(v, v)
        agreement[shuffle] = (F.normalize(method.z, dim=1) * method.k).sum(1).mean().item()
    assert agreement[False] == pytest.approx(1, abs=1e-5) and agreement[True] < .7


def test_heads_of_the_three_versions():
    """v1, v2: no BatchNorm. v3: a third layer and a last BatchNorm of the predictor for a ViT alone."""
    def layers(net):
        return "".join(type(m).__name__[0] for m in net.modules() if not isinstance(m, nn.Sequential))

    def head(version, encoder="resnet_small"):
        return moco.build(moco.Config(version=version, encoder=encoder))

    assert [layers(head(v).projector) for v in (1, 2, 3)] == ["L", "LRL", "LBRLB"]
    assert [layers(head(v).predictor) for v in (1, 2, 3)] == ["I", "I", "LBRL"]
    vit = head(3, "vit_micro")
    assert layers(vit.projector) == "LBRLBRLB" and layers(vit.predictor) == "LBRLB"
    assert not vit.projector[-1].affine and not vit.predictor[-1].affine and vit.projector[1].affine
    assert all(m.bias is None for m in [*vit.projector, *vit.predictor] if isinstance(m, nn.Linear))


def test_version_3_by_hand():
    """2 tau times the mean of both directions' cross-entropies among the keys of the batch."""
    torch.manual_seed(0)
    method = bare(5, version=3, tau=.3)
    method.predictor = nn.Linear(5, 5).requires_grad_(False)
    v1, v2 = torch.randn(2, 6, 5)
    loss = 0
    for q, k in ((v1, v2), (v2, v1)):                            # the predictor stands on the queries' side
        s = F.normalize(method.predictor(q), dim=1) @ F.normalize(k, dim=1).T / .3
        loss += .6 * (s.logsumexp(1) - s.diag()).mean().item()
    assert method(images(v1), images(v2)).item() == pytest.approx(loss, rel=1e-5)
    assert method(images(v2), images(v1)).item() == pytest.approx(loss, rel=1e-5)


def test_version_3_before_training():
    """4 tau ln B, and 4 tau / (2 P tau^2) more: 4.46 for B = 256, P = 128, tau = .2."""
    torch.manual_seed(0)
    method = bare(128, version=3)
    method.predictor = nn.Identity()
    v1, v2 = images(torch.randn(256, 128)), images(torch.randn(256, 128))
    expected = 4 * .2 * (math.log(256) + 1 / (2 * 128 * .04))
    assert method(v1, v2).item() == pytest.approx(expected, abs=.05)
    assert method(v1, v1).item() < .5 * expected


def test_version_3_of_a_vit_keeps_its_patch_projection(tmp_path, monkeypatch):
    """Projection and positions stay as they were, in student and teacher; m rises to 1."""
    torch.manual_seed(0)
    flags = "--version", "3", "--encoder", "vit_micro/16", "--steps", "3", "--lr", ".1", "--weight_decay", "1"
    method, _, log = train("moco", tmp_path, monkeypatch, *flags, images=16)
    torch.manual_seed(0)
    fresh = moco.build(moco.Config(version=3, encoder="vit_micro/16"))
    for encoder in (method.encoder, method.teacher[0]):
        assert torch.equal(encoder.patch_embed.proj.weight, fresh.encoder.patch_embed.proj.weight)
        assert torch.equal(encoder.pos_embed, fresh.encoder.pos_embed)
    assert not torch.equal(method.encoder.blocks[0].mlp.fc1.weight, fresh.encoder.blocks[0].mlp.fc1.weight)
    assert fresh.encoder.pos_embed[0, 0].abs().sum() == 0        # fixed sines and cosines, 0 for [CLS]
    assert log["m"] == pytest.approx(moco.cosine(2, 3, .99, 1.)) and log["m"] > .99


def test_an_unknown_version_is_refused():
    with pytest.raises(SystemExit, match="--version 4 is unknown: give 1, 2 or 3"):
        moco.build(moco.Config(version=4))
