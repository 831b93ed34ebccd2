"""What the loop of each method does: which views, in which order, with which flags, clipped how."""
import pytest
import torch
from running import UNTAUGHT, given, load, train

from common import cosine
from kernels.toys import toys
from kernels.views import normalise


@pytest.mark.parametrize("name", "byol barlow_twins vicreg dino ibot".split())
def test_views_of_two_kinds(name, tmp_path, monkeypatch):
    """One is always blurred, the other seldom, and alone solarised; local crops are small, half blurred."""
    module, drawn, local = load(name), [], name in ("dino", "ibot")
    views, crop = module.views, module.Config.crop
    monkeypatch.setattr(module, "views", lambda x, *a, **o: drawn.append(o) or views(x, *a, **o))
    flags = "--steps 1 --blur .1 --solarise .2".split() + ["--local", "1"] * local
    train(name, tmp_path, monkeypatch, *flags, images=16)
    known = {((crop, 1.), 1., 0.), ((crop, 1.), .1, .2)}
    known |= {((module.Config.crop_local, crop), .5, 0.)} if local else set()
    assert {(o["scale"], o["blur"], o.get("solarise", 0.)) for o in drawn} == known
    assert all((o["jitter"], o["grey"]) == ((.4, .4, .2, .1), .2) for o in drawn)


@pytest.mark.parametrize("name", "mae beit simmim colorization rotnet split_brain context_encoder igpt "
                                 "pixelcnn slot_attention".split())
def test_colours_stay_as_they_are_where_they_are_to_be_told(name, tmp_path, monkeypatch):
    """Views are crops and mirror images, nothing more."""
    module, drawn = load(name), []
    views, crop = module.views, getattr(module.Config, "crop", None)
    monkeypatch.setattr(module, "views", lambda x, *a, **o: drawn.append(o) or views(x, *a, **o))
    train(name, tmp_path, monkeypatch, "--steps", "1", images=16)
    known = dict(scale=crop and (crop, 1.), p_jitter=0, grey=0)
    assert drawn and all(o == known for o in drawn)


@pytest.mark.parametrize("name", ["bownet", "obow"])
def test_words_are_of_the_image_itself(name, tmp_path, monkeypatch):
    """What the teacher sees is no view: an image of the data, or its mirror image; the student sees none."""
    seen = given(load(name), monkeypatch)
    train(name, tmp_path, monkeypatch, "--steps", "1", "--k", "16", images=16)
    images = normalise(toys(16)["images"])
    known = torch.cat([images, images.flip(3)])
    x, v = seen[0][:2]
    assert all((known == one).flatten(1).all(1).any() for one in x)
    assert v.shape != x.shape or not any((known == one).flatten(1).all(1).any() for one in v)


def test_dinos_teacher_follows_each_step_ever_more_slowly(tmp_path, monkeypatch):
    """It moves after the optimizer, by an m that rises to 1."""
    dino, calls, ms = load("dino"), [], []
    step, update = torch.optim.AdamW.step, dino.DINO.update_teacher
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: calls.append("step") or step(self))
    monkeypatch.setattr(dino.DINO, "update_teacher", lambda self, m: (
        calls.append("teacher"), ms.append(m), update(self, m)))
    flags = "--hidden 32 --dim 16 --k 64 --size 16 --size_local 8 --steps 3 --m .9".split()
    train("dino", tmp_path, monkeypatch, *flags, images=16)
    assert calls == 3 * ["step", "teacher"] and ms == pytest.approx([cosine(i, 3, .9, 1.) for i in range(3)])


def test_simsiams_predictor_keeps_its_rate(tmp_path, monkeypatch):
    """That of encoder and projector follows the cosine, in the same steps."""
    module, rates, step = load("simsiam"), [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (
        rates.append([group["lr"] for group in self.param_groups]), step(self)))
    train("simsiam", tmp_path, monkeypatch, "--steps", "3", images=16)
    lr, warmup = module.Config.lr, module.Config.warmup
    assert sum(rates[::2], []) == pytest.approx([cosine(i, 3, lr, warmup=warmup) for i in (0, 0, 1, 1, 2, 2)])
    assert sum(rates[1::2], []) == [lr] * 6


def test_swav_fills_its_queue(tmp_path, monkeypatch):
    """Newest first, after the step."""
    m, _, _ = train("swav", tmp_path, monkeypatch, "--steps", "2", "--queue", "40", "--local", "0", images=32)
    assert m.queue.isfinite().all() and m.queue[:, :32].equal(torch.stack(m.z.chunk(2)))


def test_spot_rates_fall_in_each_stage_and_the_largest_entry_is_clipped(tmp_path, monkeypatch):
    """Warm-up and cosine twice; all is scaled by the largest entry."""
    spot, rates, set_lr = load("spot"), [], load("spot").set_lr
    monkeypatch.setattr(spot, "set_lr", lambda o, lr: rates.append(lr) or set_lr(o, lr))
    flags = "--no-pretrain --image_size 16 --steps 8 --clip 1e-4".split()
    method, _, _ = train("spot", tmp_path, monkeypatch, *flags)
    lr, warmup = spot.Config.lr, spot.Config.warmup
    assert rates == pytest.approx(2 * [cosine(i, 4, lr, warmup=warmup) for i in range(4)])
    largest = max(p.grad.abs().max().item() for p in method.student.parameters())
    assert largest == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("name", "beit simmim slot_attention dinosaur ibot dino".split())
def test_gradients_are_clipped(name, tmp_path, monkeypatch):
    """The norm of them all; DINO's and iBOT's tensor by tensor."""
    method, _, _ = train(name, tmp_path, monkeypatch, "--steps", "1", "--clip", "1e-4",
                         *UNTAUGHT.get(name, []), images=16)
    norms = torch.stack([p.grad.norm() for p in method.parameters() if p.grad is not None])
    norm = norms.max() if name in ("dino", "ibot") else norms.norm()
    assert norm.item() == pytest.approx(1e-4, rel=1e-2)


REACH = dict(moco=dict(tau=.3, splits=2, shuffle=False), swav=dict(tau=.3, eps=.02, iterations=7),
             dino=dict(tau_s=.3, centering=False), ibot=dict(tau_s=.3),
             instdisc=dict(tau=.3, negatives=3, keep=.2, proximal=7.), obow=dict(kappa=3.),
             exemplar_cnn=dict(margin=.3))


@pytest.mark.parametrize("name", REACH)
def test_flags_are_those_of_the_method(name):
    """Each is an attribute of the same name."""
    module = load(name)
    with torch.device("meta"):
        method = module.build(module.Config(**REACH[name]))
    assert {k: getattr(method, k) for k in REACH[name]} == REACH[name]


def test_sizes_and_kinds_are_those_of_the_flags():
    """What is no attribute of that name."""
    swav, ibot, exemplar, obow = (load(x) for x in ("swav", "ibot", "exemplar_cnn", "obow"))
    with torch.device("meta"):
        assert swav.build(swav.Config(queue=9)).queue.shape[1] == 9
        assert ibot.build(ibot.Config(mask="random")).kind == "random"
        assert exemplar.build(exemplar.Config(dropout=.2)).head[1].p == .2
        assert obow.build(obow.Config(inv_delta=3.)).levels[0].inv_delta == 3
