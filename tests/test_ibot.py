"""iBOT: its two losses, its two centres, its teacher, what is hidden and what is not."""
import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from running import load, train
from torch import nn

from common import cosine
from kernels.encoders import create_encoder
from kernels.prototype_ce import prototype_ce

ibot = load("ibot")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Plain PyTorch, not Triton's interpreter: the kernel has tests of its own."""
    monkeypatch.setattr(ibot, "prototype_ce", partial(prototype_ce, impl="reference"))


def small_vit(**options):
    torch.manual_seed(0)
    return ibot.IBOT(create_encoder("vit_micro/4", 16), hidden=16, dim=8, k=24, **options)


def hide(monkeypatch, mask):
    monkeypatch.setattr(ibot, "draw_masks", lambda kind, a: mask)


# ---- the loss

def test_loss_by_hand(monkeypatch):
    """[CLS] across crops, patches within a crop, each image's mean, images without hidden patches as 0."""
    method, mask = small_vit(tau_s=.2).double(), torch.zeros(6, 16, dtype=torch.bool)
    mask[0, 3] = mask[2, 1] = mask[2, 9] = mask[4, :5] = True    # two of view 1, one of view 2
    hide(monkeypatch, mask)
    for p in method.head.parameters():                           # not equal to the student
        p.mul_(1.1)
    method.center = torch.randn(2, 24).double() / 9
    v, small = torch.randn(2, 3, 3, 16, 16).double(), torch.randn(3, 3, 8, 8).double()
    loss = method(*v, small, tau_t=.5)

    (encoder, head), crops = method.student, torch.cat([*v])
    tokens = encoder.encode(encoder.embed(crops, mask, method.mask_token))
    s, s_small = head(tokens), head(encoder(small))              # [6,17,K], [3,K]
    t = method.head(method.encoder.encode(method.encoder.embed(crops)))
    def ce(s, t, c):
        p = ((t - c) / .5).softmax(0)
        return -(p * (s / .2).log_softmax(0)).sum()
    c, c_patch = method.center
    seen = s[:3, 0], s[3:, 0], s_small                           # [CLS] of each crop
    cls = [ce(seen[v][b], t[b + 3 * g, 0], c) for g in (0, 1) for v in (0, 1, 2) if v != g for b in range(3)]
    hidden = {i: mask[i].nonzero()[:, 0].tolist() for i in (0, 2, 4)}
    patch = [sum(ce(s[i, 1 + n], t[i, 1 + n], c_patch) for n in hidden[i]) / len(hidden[i]) for i in hidden]
    assert len(cls) == 4 * 3
    assert method.parts["cls"].item() == pytest.approx(sum(cls).item() / 12, rel=1e-9)
    assert method.parts["patch"].item() == pytest.approx(sum(patch).item() / 6, rel=1e-9)
    assert loss.item() == pytest.approx((sum(cls) / 12 + sum(patch) / 6).item(), rel=1e-9)


def test_a_student_that_says_nothing_pays_ln_k_for_cls_and_for_each_image_with_hidden_patches(monkeypatch):
    method, mask = small_vit(), torch.zeros(8, 16, dtype=torch.bool)
    mask[:4, 5:9] = True
    hide(monkeypatch, mask)
    for p in method.student[1].layers[-1].parameters():
        nn.init.zeros_(p)
    assert method(*torch.randn(2, 4, 3, 16, 16)).item() == pytest.approx(1.5 * math.log(24), abs=1e-5)


def test_nothing_hidden_costs_nothing_and_trains_all_the_same(monkeypatch):
    method = small_vit()
    hide(monkeypatch, torch.zeros(4, 16, dtype=torch.bool))
    method(*torch.randn(2, 2, 3, 16, 16)).backward()
    assert method.parts["patch"] == 0 and all(p.grad is not None for p in method.student.parameters())


def test_the_student_does_not_see_what_is_hidden_and_the_teacher_does(monkeypatch):
    """Noise in hidden patches of both crops changes the teacher's outputs alone; position stays known."""
    method, mask = small_vit().eval(), torch.zeros(4, 16, dtype=torch.bool)
    mask[:, 5:9] = True                                          # the row 1, but for its first, and 2, 0
    hide(monkeypatch, mask)
    heard = []
    method.student[1].register_forward_hook(lambda _, x, out: heard.append(out.detach()))
    v = torch.randn(4, 3, 16, 16)
    pixels = mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    method(*v.chunk(2))
    before = method.t_patch
    method(*torch.where(pixels, torch.randn_like(v), v).chunk(2))
    assert torch.allclose(heard[0], heard[2], atol=1e-6) and torch.allclose(heard[1], heard[3], atol=1e-6)
    assert (method.t_patch - before)[mask].abs().max() > 1e-3
    patches = heard[1].view(4, 4, -1)                            # hidden places differ from each other
    assert (patches[:, 0] - patches[:, 1]).abs().max() > 1e-4


def test_look_is_the_encoders_pass_and_its_attention():
    torch.manual_seed(0)
    encoder, x = create_encoder("vit_micro/4", 16, registers=2), torch.randn(3, 3, 16, 16)
    tokens, a = ibot.look(encoder, x)
    assert torch.allclose(tokens, encoder.encode(encoder.embed(x)), atol=1e-5)
    assert torch.allclose(a, encoder.attention(x).mean(1).flatten(1), atol=1e-6) and a.shape == (3, 16)


# ---- the teacher

def test_teacher_and_both_centres_move_after_their_use():
    other = torch.stack([torch.full((24,), 4.), torch.full((24,), -8.)])[None]
    method = small_vit(gather=lambda rows: torch.cat([rows, other]))
    teacher = nn.Sequential(method.encoder, method.head)
    before = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], .1)
    method(*torch.rand(2, 4, 3, 16, 16)).backward()
    optimizer.step()
    assert not method.center.any() and all(p.grad is None for p in teacher.parameters())
    method.update_teacher(.9)
    student = method.student.parameters()
    for t, old, s in zip(teacher.parameters(), before.parameters(), student, strict=True):
        assert torch.allclose(t, .9 * old + .1 * s, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters(), strict=True))
    assert torch.allclose(method.center[0], .05 * (method.t.mean(0) + 4), atol=1e-6)
    assert torch.allclose(method.center[1], .05 * (method.t_patch.flatten(0, 1).mean(0) - 8), atol=1e-6)


def test_head_is_shared_by_cls_and_patches():
    method, rows = small_vit(), []
    method.head.register_forward_hook(lambda _, x, out: rows.append(tuple(out.shape)))
    method.student[1].register_forward_hook(lambda _, x, out: rows.append(tuple(out.shape)))
    method(*torch.randn(2, 4, 3, 16, 16))
    assert rows == [(8, 24), (8, 16, 24), (8, 24), (method.mask.sum().item(), 24)]


# ---- what is hidden

def test_half_of_the_images_are_masked_by_a_tenth_to_a_half():
    torch.manual_seed(0)
    a = torch.rand(2000, 100)
    for kind in ibot.MASKS:
        count = ibot.draw_masks(kind, a).sum(1)
        masked = count[count > 0]
        assert abs((count > 0).double().mean() - .5) < .05, kind         # 4.5 sigma
        if kind.startswith("attmask"):
            assert masked.max() <= 50 and len(masked.unique()) <= 2      # one share a batch
        else:
            assert (9 if kind == "random" else 1) <= masked.min() < 14 and 46 < masked.max() <= 50, kind
            assert masked.double().mean() == pytest.approx(30, abs=1.5)  # of random ones 29.5


def test_random_masks_favour_no_place():
    torch.manual_seed(0)
    share = ibot.draw_masks("random", torch.rand(4000, 25), 1, .4, .4).float().mean(0)
    assert (share - .4).abs().max() < 5 * (.24 / 4000) ** .5


def test_attmask_hides_the_top_the_bottom_or_leaves_a_hint():
    torch.manual_seed(0)
    a = torch.rand(50, 100)
    order = a.argsort(1, descending=True)
    high, low = (ibot.draw_masks(f"attmask_{k}", a, 1, .3, .3) for k in ("high", "low"))
    assert (high.sum(1) == 30).all() and high.gather(1, order[:, :30]).all()
    assert (low.sum(1) == 30).all() and low.gather(1, order[:, 70:]).all()
    shown = high & ~(hint := ibot.draw_masks("attmask_hint", a, 1, .3, .3))
    assert not (hint & ~high).any() and (shown.sum(1) == 3).all()        # .1 of a share of .3
    assert shown.gather(1, order[:, :10]).sum(1).eq(3).all()             # of the top tenth,
    assert len(shown.gather(1, order[:, :10]).unique(dim=0)) > 20        # any of it


# ---- the loop

QUICK = "--hidden 32 --dim 16 --k 64 --size 16 --size_local 8 --encoder vit_micro/8".split()


def test_share_of_the_images(tmp_path, monkeypatch):
    seen, views = [], ibot.views
    monkeypatch.setattr(ibot, "views", lambda x, *a, **o: seen.append(x) or views(x, *a, **o))
    train("ibot", tmp_path, monkeypatch, *QUICK, "--steps", "2", "--share", ".25", images=16)
    assert len(seen) == 4 and all(len(x.flatten(1).unique(dim=0)) == 4 for x in seen)


def test_prototypes_are_frozen_then_trained_and_a_typo_is_named(tmp_path, monkeypatch):
    moved, update = [], ibot.IBOT.update_teacher
    def spy(self, m):
        weight = self.student[1].prototypes.weight.detach().clone()
        moved.append(bool((weight != self.head.prototypes.weight).any()))
        update(self, m)
    monkeypatch.setattr(ibot.IBOT, "update_teacher", spy)
    train("ibot", tmp_path, monkeypatch, *QUICK, "--steps", "4", "--freeze", ".5", "--local", "1", images=16)
    assert moved == [False, False, True, True]
    with pytest.raises(SystemExit, match="--mask attmask is unknown: give one of random block attmask_high"):
        ibot.build(ibot.Config(mask="attmask"))


def test_schedules_and_the_teacher_that_moves(tmp_path, monkeypatch):
    """Weight decay and m rise by a cosine, the temperature in a part of the run; what is kept moves."""
    decay, taus, ms, kept, step = [], [], [], [], torch.optim.AdamW.step
    loss, update = ibot.IBOT.forward, ibot.IBOT.update_teacher
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (
        decay.append([g["weight_decay"] for g in self.param_groups]), step(self, *a)))
    monkeypatch.setattr(ibot.IBOT, "forward", lambda self, *v, tau_t: (
        taus.append(tau_t) or loss(self, *v, tau_t=tau_t)))

    def spy(self, m):
        ms.append(m)
        update(self, m)
        kept.append(next(self.encoder.parameters()).detach().clone())

    monkeypatch.setattr(ibot.IBOT, "update_teacher", spy)
    flags = "--steps 8 --m .9 --tau_t .04 --tau_t_end .08 --rise .5 --freeze 0 --lr .01"
    train("ibot", tmp_path, monkeypatch, *QUICK, *flags.split(), images=16)
    rise = [cosine(i, 8, ibot.Config.weight_decay, ibot.Config.decay_end) for i in range(8)]
    assert [d[0] for d in decay] == pytest.approx(rise)
    assert decay[-1][0] > 2 * decay[0][0] and all(d[1] == 0 for d in decay)
    assert taus == pytest.approx([.04, .05, .06, .07] + 4 * [.08])
    assert ms == pytest.approx([cosine(i, 8, .9, 1.) for i in range(8)]) and ms[-1] > .99
    assert not kept[0].equal(kept[1]) and not kept[1].equal(kept[3])


def test_picture():
    torch.manual_seed(0)
    method = ibot.IBOT(create_encoder("vit_micro/8", 32), hidden=16, dim=8, k=24)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    rows = ibot.picture(method, images)
    assert list(rows) == ["x", "attention", *ibot.MASKS, "prototypes"]
    assert all(r.shape == (4, 3, 64, 64) for r in rows.values())
    assert rows["attention"].flatten(1).amax(1).eq(1).all()
    def hidden(kind):                                            # cells of 8 x 8 pixels, all grey
        return rows[kind].eq(.5).all(1).view(4, 8, 8, 8, 8).all(4).all(2)
    for kind in ("random", "attmask_high", "attmask_low"):
        assert (hidden(kind).sum((1, 2)) == 19).all(), kind      # .3 of 64
    x = F.interpolate(ibot.normalise(images), scale_factor=2, mode="bilinear")
    words = method.head(method.encoder.encode(method.encoder.embed(x))[:, 1:]).argmax(2).view(4, 8, 8)
    colours = rows["prototypes"][:, :, ::8, ::8].movedim(1, 3)
    for k in words.unique():                                     # a colour for each, another for the others
        assert len(colours[words == k].unique(dim=0)) == 1
    assert len(colours.flatten(0, 2).unique(dim=0)) == len(words.unique()) > 2
    a = rows["attention"][:, 0, ::8, ::8]
    for n in range(4):
        assert a[n][hidden("attmask_high")[n]].min() >= a[n][~hidden("attmask_high")[n]].max()
