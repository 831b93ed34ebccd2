"""BoWNet: its words, its targets, its two stages."""
import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from running import Lookup, load, train

from common import cosine
from kernels.toys import toys
from kernels.views import normalise

bownet = load("bownet")


class Maps(Lookup):
    """An encoder whose last map but one is the image's first two channels."""
    def layers(self, x):
        return [x[:, :2] + self.p, x]


def made(k=3, dim=12):
    torch.manual_seed(0)
    method = bownet.BoWNet(Maps(dim), 2, k)
    method.words = torch.tensor([[0., 0.], [9., 0.], [0., 9.]])
    return method


def bag(x):
    """Looked up place by place."""
    words = [[0., 0.], [9., 0.], [0., 9.]]
    y = torch.zeros(len(x), 3)
    for b, image in enumerate(x[:, :2].flatten(2).tolist()):
        for place in zip(*image, strict=True):
            y[b, min(range(3), key=lambda k: math.dist(place, words[k]))] = 1
    return y / y.sum(1, keepdim=True)


def test_target_is_uniform_over_the_words_of_the_image():
    """Every word has a logit of its own, so that the loss tells the target."""
    method = made()
    x = torch.tensor([[[[1., 2., 0.], [0., 0., 0.]], [[1., 1., -2.], [7., 0., -5.]], [[0.] * 3] * 2]])
    assert bag(x).tolist()[0] == pytest.approx([1 / 2, 0, 1 / 2])        # places: 0 0 0 / 2 0 0
    method.weight.data = torch.eye(3, 12)
    v = torch.zeros(1, 3, 2, 2).view(1, 12)
    v[0, :3] = torch.tensor([1., 2., 4.])
    log_p = torch.tensor([1., 2., 4.]).log_softmax(0)
    expected = -(log_p[0] + log_p[2]).item() / 2
    assert method(x, v.view(1, 3, 2, 2)).item() == pytest.approx(expected, rel=1e-6)


def test_k_means_ends_where_each_word_is_the_mean_of_its_vectors():
    torch.manual_seed(0)
    x = torch.randn(300, 4) + 20 * F.one_hot(torch.arange(300) % 4)
    words = bownet.kmeans(x, 9, iterations=60)
    word = torch.cdist(x, words).argmin(1)
    means = torch.stack([x[word == k].mean(0) for k in range(9)])
    assert torch.allclose(words, means, atol=1e-4) and word.unique().numel() == 9


def test_k_means_moves_dead_words(monkeypatch):
    """From four equal words three are nearest to nothing, until they start again elsewhere."""
    torch.manual_seed(0)
    randint, calls = torch.randint, iter(range(99))
    monkeypatch.setattr(torch, "randint", lambda n, size: randint(n, size) * (next(calls) > 0))
    x = torch.eye(4).repeat(25, 1)
    words = bownet.kmeans(x, 4, iterations=40)
    assert torch.equal(words.sort(0).values, torch.eye(4).sort(0).values) and words.isfinite().all()


def test_word_weights_are_of_unit_length_and_gamma_is_the_scale():
    method = made()
    x, v = torch.rand(2, 5, 3, 2, 2) * 9
    loss = method(x, v).item()
    unit = F.normalize(method.weight.data, dim=1)
    y = bag(x)
    log_p = (v.flatten(1) @ unit.T).log_softmax(1)               # gamma starts at 1, h is v
    assert loss == pytest.approx(-(y * log_p).sum(1).mean().item(), rel=1e-5)
    method.weight.data *= torch.tensor([[2.], [3.], [5.]])
    assert method(x, v).item() == pytest.approx(loss, rel=1e-5)
    method.gamma.data.zero_()
    assert method(x, v).item() == pytest.approx(math.log(3), abs=1e-6)


def test_the_teacher_stays_in_evaluation_mode():
    method = made().train()
    method(*torch.rand(2, 5, 3, 2, 2))
    assert not method.teacher.training


def test_targets_are_of_the_clean_image_and_kl_is_what_is_lost():
    method = made()
    x, v = torch.rand(2, 5, 3, 2, 2) * 9
    method(x, v)
    perplexity, kl = method.perplexity, method.kl
    loss = method(x, 0 * v)                                      # h = 0: all words alike
    y = bag(x)
    assert method.perplexity == perplexity and kl != method.kl
    entropy = -torch.xlogy(y, y).sum(1).mean().item()
    assert loss.item() == pytest.approx(math.log(3), abs=1e-6)
    assert method.kl.item() == pytest.approx(math.log(3) - entropy, abs=1e-5)
    method(torch.zeros_like(x), v)
    assert method.perplexity.item() == pytest.approx(1)          # the same word everywhere


def test_no_gradient_reaches_the_teacher():
    method = made()
    x, v = torch.rand(5, 3, 2, 2).requires_grad_(), torch.rand(5, 3, 2, 2).requires_grad_()
    method(x, v).backward()
    assert x.grad is None and v.grad.abs().sum() > 0
    assert method.teacher.p.grad is None and not method.teacher.training and method.training


def test_first_stage_trains_the_teacher_which_then_stands(tmp_path, monkeypatch):
    """Twelve steps at --first .3 are 4 of rotation, and nothing of the teacher changes afterwards."""
    stage, found, seen, optimizer = bownet.first_stage, [], [], bownet.make_optimizer
    monkeypatch.setattr(bownet, "first_stage", lambda *a: found.extend(stage(*a)) or tuple(found))
    monkeypatch.setattr(bownet, "make_optimizer", lambda *a: seen.append(optimizer(*a)) or seen[-1])
    method, _, _ = train("bownet", tmp_path, monkeypatch, "--steps", "12", "--first", ".3", "--k", "16",
                         images=16)
    encoder, words = found
    assert [int(next(iter(o.state.values()))["step"]) for o in seen] == [12, 4]
    assert torch.equal(method.words, words) and words.shape == (16, 64) and words.unique(dim=0).shape[0] == 16
    for name, value in encoder.state_dict().items():
        assert torch.equal(method.teacher.state_dict()[name], value), name
        if name.endswith("conv1.weight"):
            assert not torch.equal(method.encoder.state_dict()[name], value)
    assert encoder.bn1.num_batches_tracked == 4 and method.encoder.bn1.num_batches_tracked == 12


def test_words_are_of_normalised_images_and_the_first_stage_has_a_rate_of_its_own(tmp_path, monkeypatch):
    """Warm-up and cosine twice; k-means has the teacher's places of the data's images."""
    rates, seen, kmeans, set_lr = [], [], bownet.kmeans, bownet.set_lr
    monkeypatch.setattr(bownet, "set_lr", lambda o, lr: rates.append(lr) or set_lr(o, lr))
    monkeypatch.setattr(bownet, "kmeans", lambda x, k: seen.append(x) or kmeans(x, k))
    flags = "--steps 6 --first .5 --k 16".split()
    method, _, _ = train("bownet", tmp_path, monkeypatch, *flags, images=16)
    lr, warmup = bownet.Config.lr, bownet.Config.warmup
    assert rates == pytest.approx([cosine(i, n, lr, warmup=warmup) for n in (3, 6) for i in range(n)])
    with torch.no_grad():
        known = method.teacher.eval().layers(normalise(toys(16)["images"]))[-2].flatten(2).mT    # [16,N,C]
    parts = seen[0].view(known.shape)
    assert all((parts - one).abs().amax((1, 2)).min() < 1e-4 for one in known)


def test_of_several_processes_the_first_gives_teacher_and_words(tmp_path, monkeypatch):
    """Each trains its own, which on a GPU are not the same to the bit."""
    encoder, words = bownet.make_encoder(bownet.Config()), torch.rand(8, 64)
    monkeypatch.setattr(bownet, "first_stage", lambda *a: (encoder, words))
    monkeypatch.setattr(bownet.common, "gather", lambda z: torch.cat([1 + z, z]))
    method, _, _ = train("bownet", tmp_path, monkeypatch, "--steps", "1", "--k", "8", images=16)
    assert all(v.equal(1 + encoder.state_dict()[k]) for k, v in method.teacher.state_dict().items())
    assert method.words.equal(1 + words)


def test_first_stage_turns_as_its_labels_say(monkeypatch):
    """Each image comes four times, turned as often as its label says."""
    seen, turns, ce, net = [], [], F.cross_entropy, Maps(12)
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    monkeypatch.setattr(bownet, "make_encoder", lambda cfg: net)
    monkeypatch.setattr(bownet.F, "cross_entropy", lambda z, y: turns.append(y.tolist()) or ce(z, y))
    images = torch.randint(256, (8, 3, 6, 6), dtype=torch.uint8)
    run = SimpleNamespace(total=1, device="cpu", print=print)
    bownet.first_stage(bownet.Config(first=1., k=3, batch_size=4), run, images)
    x, k = seen[0], turns[0]
    assert k[:4] == [0] * 4 and sorted(k) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert all(x[i].equal(x[i % 4].rot90(k[i], (1, 2))) for i in range(16))


def test_first_stage_is_timed_and_not_repeated_by_a_resumed_run(tmp_path, monkeypatch):
    def slow(cfg, run, images):
        time.sleep(1)
        return bownet.make_encoder(cfg), torch.rand(8, 64)

    monkeypatch.setattr(bownet, "first_stage", slow)
    flags = "--steps", "4", "--k", "8"
    method, losses, log = train("bownet", tmp_path, monkeypatch, *flags, images=16, stop=2)
    assert len(losses) == 2 and log["seconds"] > 1
    monkeypatch.setattr(bownet, "first_stage", None)
    again, losses, log = train("bownet", tmp_path, monkeypatch, *flags, "--resume", images=16)
    assert len(losses) == 2 and torch.equal(again.words, method.words) and log["seconds"] > 1
