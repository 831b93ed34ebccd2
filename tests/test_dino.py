"""DINO: its pairs, its centre, its teacher, its schedules, both collapses, and the masks from attention."""
import copy
import math
from functools import partial

import pytest
import torch
from running import Lookup, load, train
from torch import nn

from kernels.encoders import create_encoder
from kernels.prototype_ce import prototype_ce

dino = load("dino")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Plain PyTorch, not Triton's interpreter: the kernel has tests of its own."""
    monkeypatch.setattr(dino, "prototype_ce", partial(prototype_ce, impl="reference"))


def lookup(k=4, **options):
    """Teacher and student put out the first k pixels."""
    method = dino.DINO(Lookup(k), k=k, **options)
    method.head, method.student[1] = nn.Identity(), nn.Identity()
    return method


def small_vit(**options):
    torch.manual_seed(0)
    return dino.DINO(create_encoder("vit_micro/4", 16), hidden=16, dim=8, k=24, **options)


# ---- the loss

def test_loss_is_the_mean_over_ordered_pairs_of_different_crops():
    """Pair by pair, image by image, with the softmax written out; 2V-2 pairs, none of a crop with itself."""
    torch.manual_seed(0)
    method = lookup(tau_s=.2)
    method.center = torch.tensor([.3, -.1, 0., .5])
    big, small = torch.randn(2, 5, 3, 4, 4), torch.randn(3, 5, 3, 2, 2)
    crops = [v.flatten(1)[:, :4] for v in (*big, *small)]
    terms = []
    for g in (0, 1):
        for v in range(5):
            for t, s in zip(crops[g], crops[v], strict=True) if v != g else ():
                p = [math.exp(a / .5) for a in (t - method.center).tolist()]
                total = math.log(sum(math.exp(a / .2) for a in s.tolist()))
                terms += [sum(w / sum(p) * (total - a / .2) for w, a in zip(p, s.tolist(), strict=True))]
    assert len(terms) == 8 * 5
    assert method(*big, *small, tau_t=.5).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_a_student_that_says_nothing_pays_ln_k():
    method = small_vit()
    for p in method.student[1].layers[-1].parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, 6, 3, 16, 16)
    assert method(*x).item() == pytest.approx(math.log(24), abs=1e-5)


def test_the_teacher_sees_global_crops_only_and_each_size_passes_once():
    method, seen = small_vit(), []
    for name, encoder in (("teacher", method.encoder), ("student", method.student[0])):
        encoder.register_forward_pre_hook(lambda _, x, name=name: seen.append((name, tuple(x[0].shape))))
    method(*torch.randn(2, 5, 3, 16, 16), *torch.randn(3, 5, 3, 8, 8)).backward()
    assert sorted(seen) == [("student", (10, 3, 16, 16)), ("student", (15, 3, 8, 8)),
                            ("teacher", (10, 3, 16, 16))]
    assert all(p.grad is None for m in (method.encoder, method.head) for p in m.parameters())
    assert all(p.grad.abs().sum() > 0 for p in method.student.parameters())


def test_head_has_unit_prototypes_and_batch_norm_only_for_convnets():
    torch.manual_seed(0)
    head = dino.Head(width=12, hidden=400, dim=300, k=7, norm=False)
    h = torch.randn(50, 12)
    z, w = head.layers(h), head.prototypes.weight
    assert torch.allclose(head(h), z @ w.T / z.norm(dim=1, keepdim=True) / w.norm(dim=1), atol=1e-6)
    assert [type(m) for m in head.layers] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert head.layers[2].weight.std().item() == pytest.approx(.02, rel=.02) and head.prototypes.bias is None
    nn.init.constant_(w, 2.)
    assert torch.allclose(head(h).std(1), torch.zeros(50), atol=1e-6)
    kinds = [type(m) for m in dino.DINO(create_encoder("resnet_small", 16)).head.layers]
    assert kinds == 2 * [nn.Linear, nn.BatchNorm1d, nn.GELU] + [nn.Linear]
    assert not any(isinstance(m, nn.BatchNorm1d) for m in small_vit().modules())


# ---- the teacher

def test_the_centre_moves_after_its_use_by_the_raw_outputs_of_all_processes():
    torch.manual_seed(0)
    other = torch.tensor([[4., 0., 0., -8.]])
    method = lookup(gather=lambda rows: torch.cat([rows, other]))
    x = torch.randn(2, 5, 3, 4, 4)
    loss = method(*x, tau_t=.1)
    loss.backward()                                              # the centre in backward is that of forward
    assert not method.center.any()
    method.update_teacher(.9)
    mean = (x.flatten(2)[:, :, :4].mean((0, 1)) + other[0]) / 2
    assert torch.allclose(method.center, .1 * mean, atol=1e-6)
    again = method(*x, tau_t=.1)
    assert torch.allclose(method.center, .1 * mean, atol=1e-6) and abs(again - loss) > .01
    method.update_teacher(.9)
    assert torch.allclose(method.center, .19 * mean, atol=1e-6)
    assert "center" in method.state_dict()


def test_without_centering_the_centre_stays_0(tmp_path, monkeypatch):
    for flags, moves in ((), True), (("--no-centering",), False):
        method, _, _ = train("dino", tmp_path, monkeypatch, *QUICK, "--steps", "2", *flags, images=16)
        assert bool(method.center.any()) == moves


def test_teacher_is_an_average_of_weights_only():
    torch.manual_seed(0)
    method = dino.DINO(create_encoder("resnet_small", 16), hidden=16, dim=8, k=24)
    teacher = nn.Sequential(method.encoder, method.head)
    before = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(method.student.parameters(), .1)
    method(*torch.rand(2, 8, 3, 16, 16)).backward()
    optimizer.step()
    buffers = [b.clone() for b in teacher.buffers()]
    method.update_teacher(.9)
    names = [name for name, _ in teacher.named_parameters()]
    for name, t, old, s in zip(names, teacher.parameters(), before.parameters(), method.student.parameters(),
                               strict=True):
        assert torch.allclose(t, .9 * old + .1 * s, atol=1e-7) and not t.requires_grad, name
    assert any(not torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, teacher.buffers(), strict=True))
    assert all(b == 1 for name, b in teacher.named_buffers() if name.endswith("num_batches_tracked"))


# ---- the loop

QUICK = "--hidden 32 --dim 16 --k 64 --size 16 --size_local 8 --local 1 --encoder vit_micro/8".split()


def test_prototypes_are_frozen_then_trained(tmp_path, monkeypatch):
    """Not even weight decay moves them in the first half; schedules reach only the weights' group."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *args):
        params = [p for group in self.param_groups for p in group["params"]]
        weight = next(p for p in params if p.shape == (64, 16))
        grads = torch.stack([p.grad.norm() for p in params if p.grad is not None])
        before = weight.detach().clone()
        step(self, *args)
        seen.append(dict(moved=bool((weight != before).any()), largest=grads.max().item(),
                         all=grads.norm().item(), decay=[g["weight_decay"] for g in self.param_groups]))

    taus, loss = [], dino.prototype_ce
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(dino, "prototype_ce", lambda s, t, a, b, c: taus.append(b) or loss(s, t, a, b, c))
    flags = "--steps 20 --freeze .5 --clip .01 --tau_t .04 --tau_t_end .07"
    train("dino", tmp_path, monkeypatch, *QUICK, *flags.split(), images=16)
    assert [x["moved"] for x in seen] == 10 * [False] + 10 * [True]
    decay = [x["decay"][0] for x in seen]
    assert decay[0] == pytest.approx(.04) and decay[10] == pytest.approx(.22) and .39 < decay[19] < .4
    assert all(x["decay"][1] == 0 for x in seen)
    assert max(x["largest"] for x in seen) < .010001 < .02 < max(x["all"] for x in seen)    # one by one
    assert taus[::4] == pytest.approx([.04, .055] + 18 * [.07])


def test_both_collapses_are_named(tmp_path, monkeypatch, capsys):
    """Without the centre one prototype wins; without the sharper teacher all stay equal, at ln K."""
    flags = "--steps 40 --hidden 64 --dim 64 --k 64 --size 16 --size_local 8 --local 1 --freeze 0 --m .9"
    flags = [*flags.split(), "--lr", "2e-3", "--data", "toys:n=32"]
    _, _, kept = train("dino", tmp_path / "a", monkeypatch, *flags, images=32)
    assert kept["perplexity"] > 10 and kept["kl"] > .2
    capsys.readouterr()
    _, losses, log = train("dino", tmp_path / "b", monkeypatch, *flags, "--no-centering", images=32)
    assert "perplexity is" in capsys.readouterr().out and log["perplexity"] < 2 and losses[-1] < 1
    _, losses, log = train("dino", tmp_path / "c", monkeypatch, *flags, "--no-sharpening", images=32)
    assert "the loss sits on ln 64" in capsys.readouterr().out and log["kl"] < .05 and log["perplexity"] > 60


def test_usage():
    one, each, c = 1e3 * torch.eye(5)[[2] * 4], 1e3 * torch.eye(5)[:4], torch.zeros(5)
    assert [x.item() for x in dino.usage(one, c, .1).values()] == pytest.approx([1, math.log(5)], abs=1e-5)
    assert [x.item() for x in dino.usage(each, c, .1).values()] == pytest.approx([4, math.log(5)], abs=1e-5)
    assert [x.item() for x in dino.usage(one, one[0], .1).values()] == pytest.approx([5, 0], abs=1e-5)
    p = torch.tensor([.5, .25, .25])
    assert [x.item() for x in dino.usage(p.log()[None] * .1, c[:3], .1).values()] == pytest.approx(
        [2 ** 1.5, math.log(3) - 1.5 * math.log(2)], abs=1e-5)


# ---- the picture

def test_most_keeps_the_fewest_patches_with_the_share():
    a = torch.tensor([[.1, .4, .3, .2], [.7, .1, .1, .1], [0., 0., .5, .5]])
    assert dino.most(a).tolist() == [[False, True, True, False], [True, False, False, False],
                                     [False, False, True, True]]
    a = torch.rand(20, 3, 30)
    kept = dino.most(5 * a)                                      # whatever it sums to
    mass, smallest = (a * kept).sum(-1), a.masked_fill(~kept, 9).amin(-1)
    assert (mass >= .6 * a.sum(-1)).all() and (mass - smallest < .6 * a.sum(-1)).all()
    assert (smallest > a.masked_fill(kept, -1).amax(-1)).all()


def test_attend_takes_the_head_nearest_to_the_object():
    """Of two images: one head looks at the left half, one at the top row of four cells; objects known."""
    class Looks(nn.Module):
        def attention(self, x):
            self.shape, a = tuple(x.shape), torch.zeros(2, 2, 4, 4)
            a[:, 0, :, :2], a[:, 1, 0] = 1, 1
            return a

    masks, encoder = torch.zeros(2, 8, 8, dtype=torch.uint8), Looks()
    masks[0, :, :4], masks[1, :2] = 3, 1
    masks[1, 0, 0] = 0
    a, seen, iou = dino.attend(encoder, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), masks)
    assert encoder.shape == (2, 3, 16, 16) and a.shape == (2, 2, 8, 8)
    assert a[0, 1].sum() == a[0, 1, :2].sum() == 16              # nearest: four cells of 2 x 2 pixels
    share = math.ceil(.6 * 8) / 8                                # 5 of the 8 cells of the left half
    assert iou[0].item() == pytest.approx(share) and seen[0, :, 4:].sum() == 0 and seen[0].sum() == 20
    assert iou[1].item() in (pytest.approx(11 / 16), pytest.approx(12 / 15))
    assert seen[1, 2:].sum() == 0


def test_discs_see_no_image_and_are_chosen_as_heads_are():
    masks = torch.zeros(3, 40, 40, dtype=torch.uint8)
    seen = dino.discs(masks)
    assert seen.shape == (3, 4, 40, 40) and torch.equal(seen[0], seen[2])
    assert (seen.sum((2, 3)) / 1600 - math.pi / 16).abs().max() < .01    # a quarter of a side is the radius
    masks[0][seen[0, 2]], masks[1, :20], masks[2, 20:, :20] = 1, 1, 1
    best, iou = dino.nearest(seen, masks)
    assert iou[0] == 1 and torch.equal(best[0], seen[0, 2]) and torch.equal(best[2], seen[0, 2])
    assert iou[1].item() == pytest.approx((seen[0, 0, :20].sum() / (800 + seen[0, 0, 20:].sum())).item())


@pytest.mark.parametrize("encoder", ["vit_micro/8", "resnet_small"])
def test_pictures(encoder, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(dino.common, "save_grid", lambda path, rows, note: found.update({path.name: rows}))
    train("dino", tmp_path, monkeypatch, *QUICK[:-1], encoder, "--steps", "1", images=16)
    assert ("attention.png" in found) == (encoder != "resnet_small") and "neighbours.png" in found
    if encoder != "resnet_small":
        rows = found["attention.png"]
        assert list(rows) == ["x", "head 1", "head 2", "head 3", "head 4", "60 % of the best", "the object"]
        assert all(r.shape == (10, 3, 32, 32) for r in rows.values())
        assert all(rows[f"head {i}"].flatten(1).amax(1).eq(1).all() for i in (1, 2, 3, 4))
