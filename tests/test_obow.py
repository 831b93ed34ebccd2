"""OBoW: soft words of a slow teacher, a queue of them, weights generated from them; the order of a step."""
import math

import pytest
import torch
import torch.nn.functional as F
from running import Lookup, load, train

obow = load("obow")


class Maps(Lookup):
    """An encoder with two maps: the image's first two channels, and all three in half the size."""
    def layers(self, x):
        return [x, x[:, :2] + self.p, F.avg_pool2d(x, 2) + self.p]


def made(k=5, dim=6, **options):
    torch.manual_seed(0)
    return obow.OBoW(Maps(dim), [2, 3], k, **options)


def vocabulary(k=4, channels=2, inv_delta=3.):
    torch.manual_seed(0)
    return obow.Vocabulary(k, channels, 6, inv_delta, lambda z: z)


def test_bag_of_words_by_hand():
    """Squared distances over mu, which moves before it is used; the maximum of all places; sum 1."""
    v, maps = vocabulary(), torch.rand(3, 2, 4, 5)
    least, places = [], [[a.tolist() for a in image.flatten(1).T] for image in maps]
    for image in places:
        for a in image:
            least.append(min(math.dist(a, word) ** 2 for word in v.words.tolist()))
    mu = .99 * .5 + .01 * sum(least) / len(least)
    bag = v.bag_of_words(maps)
    assert v.mu.item() == pytest.approx(mu, rel=1e-5)
    for image, row in zip(places, bag.tolist(), strict=True):
        best = [0.] * 4
        for a in image:
            e = [math.exp(-3 / mu * math.dist(a, word) ** 2) for word in v.words.tolist()]
            best = [max(b, x / sum(e)) for b, x in zip(best, e, strict=True)]
        assert row == pytest.approx([b / sum(best) for b in best], rel=1e-4)


def test_words_do_not_depend_on_the_scale_of_the_features():
    """All is divided by mu: features and words ten times as large have the same bags."""
    maps, bags = torch.rand(3, 2, 4, 4), []
    for scale in (1., 10.):
        v = vocabulary()
        v.words *= scale
        v.mu *= scale ** 2
        bags.append(v.bag_of_words(scale * maps))
    assert torch.allclose(*bags, atol=1e-6)


def test_border_is_dropped_from_large_maps_only():
    for side, same in ((6, True), (5, False)):
        a = torch.rand(2, 2, side, side)
        b = a.clone()
        b[:, :, 0], b[:, :, :, -1] = 7, -7
        assert torch.allclose(vocabulary().bag_of_words(a), vocabulary().bag_of_words(b)) == same


def test_one_place_is_the_mean_of_three_by_three():
    torch.manual_seed(0)
    maps, v, found = torch.randn(200, 2, 4, 5), vocabulary(), []
    v.bag_of_words(maps)
    for a, row in zip(maps, v.new, strict=True):
        means = {(i, j): a[:, i:i + 3, j:j + 3].mean((1, 2)) for i in range(2) for j in range(3)}
        found += [place for place, mean in means.items() if torch.allclose(mean, row, atol=1e-6)]
    assert len(found) == 200 and len(set(found)) == 6


def test_queue_drops_the_oldest():
    v = vocabulary()
    old = v.words.clone()
    v.bag_of_words(torch.rand(3, 2, 4, 4))
    assert torch.equal(v.words, old)                             # the bag was of the words before
    v.enqueue()
    assert torch.equal(v.words, torch.cat([old[3:], v.new])) and v.new.shape == (3, 2)
    v.new = torch.arange(14.).view(7, 2)                         # more than there is room for
    v.enqueue()
    assert torch.equal(v.words, torch.arange(6., 14.).view(4, 2))
    v.gather = lambda z: torch.cat([z[:1], -z[:1]])              # what all processes have found
    v.enqueue()
    assert v.words[1:].tolist() == [[12., 13.], [0., 1.], [0., -1.]]


def test_starts_with_clamped_noise():
    words = obow.Vocabulary(4000, 3, 6, 3., None).words
    assert (words >= 0).all() and (words == 0).float().mean().item() == pytest.approx(.5, abs=.02)
    assert words.square().mean().item() == pytest.approx(.5, abs=.05)


def test_weights_are_unit_vectors_of_the_words_directions():
    v = vocabulary(k=50)
    w = v.weights()
    assert torch.allclose(w.norm(dim=1), torch.ones(50)) and w.shape == (50, 6)
    v.words *= 3
    assert torch.allclose(v.weights(), w, atol=1e-5)             # a word's length plays no part
    v.words[0] = torch.tensor([1., 2.])
    one = v.weights()[0]
    v.words[0] = torch.tensor([2., 1.])
    assert (v.weights()[0] - one).norm() > .1                    # its direction does
    assert set(v.state_dict()) > {"words", "mu"} and not v.words.requires_grad


def test_loss_is_the_mean_of_levels_and_the_sum_of_crop_sizes():
    """Crops of a size follow each other as a whole batch does; written out crop by crop."""
    method = made(kappa=2.)
    x, large, small = torch.rand(3, 3, 8, 8), torch.rand(6, 3, 4, 4), torch.rand(9, 3, 2, 2)
    loss = method(x, large, small)
    weights = [level.weights() for level in method.levels]
    maps, expected = method.teacher.layers(x)[1:], 0
    for level, a, w in zip(method.levels, maps, weights, strict=True):
        inner = a[..., 1:-1, 1:-1] if a.shape[2] > 5 else a
        d = torch.cdist(inner.flatten(2).mT, level.words)        # mu goes back, to arrive where it was
        level.mu = (level.mu - .01 * d.amin(2).square().mean()) / .99
        y = level.bag_of_words(a)
        for v in (large, small):
            log_p = (2 * v.flatten(1)[:, :6] @ w.T).log_softmax(1)
            expected += sum(-(y[i % 3] * log_p[i]).sum() for i in range(len(v))) / len(v) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_starts_at_ln_k_for_each_crop_size():
    method = made(k=7, kappa=0.)
    x = torch.rand(4, 3, 8, 8)
    assert method(x, x).item() == pytest.approx(math.log(7), abs=1e-6)
    assert method(x, x, x[:, :, :4, :4]).item() == pytest.approx(2 * math.log(7), abs=1e-6)
    assert 0 < method.kl.item() < 2 * math.log(7)


def test_perplexity_tells_a_collapse():
    """The same bag for all images, of one word: 1. Words that are all alike: every one is as near, K."""
    method = made(k=6, inv_delta=1e4)
    method.levels[0].words = torch.arange(12.).view(6, 2)
    method(torch.zeros(4, 3, 8, 8), torch.rand(4, 3, 8, 8))
    assert method.perplexity.item() == pytest.approx(1, abs=1e-4)
    method.levels[0].words[:] = 1
    method(torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8))
    assert method.perplexity.item() == pytest.approx(6, abs=1e-3)


def test_gradient_reaches_encoder_and_generators_alone():
    method = made()
    x, v = torch.rand(4, 3, 8, 8).requires_grad_(), torch.rand(4, 3, 4, 4).requires_grad_()
    method(x, v).backward()
    assert x.grad is None and v.grad.abs().sum() > 0 and method.teacher.p.grad is None
    for level in method.levels:
        assert all(p.grad.abs().sum() > 0 for p in level.generator.parameters())


def test_teacher_is_an_average_of_weights_only():
    method = obow.build(obow.Config(k=8))
    for p in method.encoder.parameters():
        p.data += 1
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    method.encoder.bn1.running_mean += 5
    method.update_teacher(.9)
    student = dict(method.encoder.named_parameters())
    for name, value in method.teacher.state_dict().items():
        moved = .9 * before[name] + .1 * student[name] if name in student else before[name]
        assert torch.allclose(value, moved, atol=1e-6), name


def test_order_of_a_step(tmp_path, monkeypatch):
    """The teacher moves, tells its words, the optimizer steps, the queue takes new ones; m rises to 1."""
    calls, momenta = [], []
    for name in ("update_teacher", "enqueue", "forward"):
        real = getattr(obow.OBoW, name)
        monkeypatch.setattr(obow.OBoW, name, lambda self, *a, name=name, real=real: (
            calls.append(name), momenta.extend(a if name == "update_teacher" else ()), real(self, *a))[-1])
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: calls.append("step") or step(self))
    method, _, log = train("obow", tmp_path, monkeypatch, "--steps", "2", "--k", "32", "--m", ".8", images=16)
    assert calls == 2 * ["update_teacher", "forward", "step", "enqueue"]
    assert momenta == [.8, pytest.approx(.9)] and log["m"] == pytest.approx(.9)
    words = method.levels[0].words
    assert torch.equal(words[-16:], method.levels[0].new)        # 2 x 16 words: all are new, and the first
    assert (words == 0).float().mean() < .2                      # ones were half zeros
    assert method.teacher.bn1.num_batches_tracked == 2           # it trains its statistics


def test_crops_of_both_sizes(tmp_path, monkeypatch):
    sizes, forward = [], obow.OBoW.forward
    monkeypatch.setattr(obow.OBoW, "forward", lambda self, *a: (
        sizes.append([tuple(x.shape) for x in a]), forward(self, *a))[1])
    flags = "--steps", "1", "--k", "16", "--patches", "3", "--patch_size", "12", "--crop_size", "20"
    train("obow", tmp_path, monkeypatch, *flags, images=16)
    assert sizes == [[(16, 3, 32, 32), (32, 3, 20, 20), (48, 3, 12, 12)]]
