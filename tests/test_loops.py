"""What each loop does: which views of which images, in which order, clipped how; what is measured on what."""
import pytest
import torch
from running import UNTAUGHT, given, load, train

from common import cosine
from kernels.slots import enlarge
from kernels.toys import toys
from kernels.views import normalise

STRONG = dict(scale=(.2, 1.), jitter=(.4, .4, .4, .1), grey=.2)
ONE = dict(scale=(.2, 1.), jitter=(.4, .4, .2, .1), grey=.2, blur=1.)
TWO = ONE | dict(blur=.3, solarise=.4)
PLAIN = dict(p_jitter=0, grey=0)
KINDS = "--crop .2 --blur .3 --solarise .4 "
CROPS = KINDS + "--size 24 --size_local 16 --local 2 --crop_local .1"
SMALL = (16,), ONE | dict(scale=(.1, .2), blur=.5)
VIEWS = dict(                                                    # flags; arguments of each view of a step
    simclr=("--crop .2 --blur .3 --color 1", 2 * [((), STRONG | dict(jitter=(.8, .8, .8, .2), blur=.3))]),
    moco=("--crop .2 --blur .3", 2 * [((), STRONG | dict(blur=.3))]),
    simsiam=("--crop .2 --blur .3", 2 * [((), STRONG | dict(blur=.3))]),
    instdisc=("--crop .2", [((), STRONG)]),
    bownet=("--crop .2 --k 16", [((), STRONG)]),
    obow=("--crop .2 --crop_max .5 --crop_size 24 --patches 2 --patch_size 16 --blur .3 --k 16",
          2 * [((24,), STRONG | dict(scale=(.2, .5), blur=.3))]
          + 2 * [((16,), STRONG | dict(scale=(.08, .15), blur=0.))] + [((), PLAIN | dict(scale=None))]),
    swav=("--crop .2 --blur .3 --local 2 --crop_local .1 --size_local 16",
          2 * [((), STRONG | dict(jitter=(.8, .8, .8, .2), blur=.3))]
          + 2 * [((), STRONG | dict(jitter=(.8, .8, .8, .2), blur=.3, size=16, scale=(.1, .2)))]),
    **{name: (KINDS, [((), ONE), ((), TWO)]) for name in "byol barlow_twins vicreg".split()},
    **{name: (CROPS, [((24,), ONE), ((24,), TWO), SMALL, SMALL]) for name in ("dino", "ibot")},
    jigsaw=("--crop .6 --grey .3", [((), dict(scale=(.6, 1.), ratio=(1, 1), flip=0, p_jitter=0, grey=.3))]),
    context_prediction=("--crop .6 --patch 12 --gap 4 --jitter 1",
                        [((46,), PLAIN | dict(scale=(.6, 1.), ratio=(1, 1)))]),
    # crops and mirror images, nothing more, where colours are to be told, or what stands upright
    **{name: ("--crop .6", [((), PLAIN | dict(scale=(.6, 1.)))]) for name in
       "mae beit simmim colorization rotnet split_brain context_encoder supervised transfer".split()},
    **{name: ("", [((), PLAIN | dict(scale=None))]) for name in "igpt pixelcnn slot_attention".split()})


FIRST = dict(bownet=[((), PLAIN | dict(scale=(.7, 1.)))])         # of its first stage, before it turns them


def of_a_step(module, monkeypatch):
    """(arguments, options) of each call of views() in the loop, all of the step's images; and outside."""
    drawn, outside, now, views, steps = [], [], [], module.views, module.Run.steps

    def watched(self, n):
        for step, index in steps(self, n):
            now[:] = [self.data.images[index]]
            yield step, index
            now.clear()

    def drawing(x, *arguments, **options):
        assert not now or x.equal(now[0])
        (drawn if now else outside).append((arguments, options))
        return views(x, *arguments, **options)

    monkeypatch.setattr(module.Run, "steps", watched)
    monkeypatch.setattr(module, "views", drawing)
    return drawn, outside


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_of_the_same_images_as_the_flags_say(name, tmp_path, monkeypatch):
    """Those outside the loop, of a first stage or a picture, are drawn alike."""
    (flags, known), (drawn, outside) = VIEWS[name], of_a_step(load(name), monkeypatch)
    train(name, tmp_path, monkeypatch, "--steps", "1", *flags.split(), images=16)
    assert drawn == [(arguments, pytest.approx(options)) for arguments, options in known]
    assert all(call in FIRST.get(name, drawn) for call in outside)
    assert outside or name not in ("bownet", "beit")             # which have a first stage


def test_simclr_changes_one_view_where_some_transformations_are_named(tmp_path, monkeypatch):
    simclr = load("simclr")
    drawn, _ = of_a_step(simclr, monkeypatch)
    train("simclr", tmp_path, monkeypatch, "--steps", "1", "--only", "crop,color", images=16)
    (_, one), (_, two) = drawn
    assert two["scale"] is None and not two["p_jitter"] and one["scale"] and one.get("p_jitter", .8)


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


@pytest.mark.parametrize("name, first, flags", [
    ("dino", "step", "--hidden 32 --dim 16 --k 64 --size 16 --size_local 8"), ("byol", "step", ""),
    ("ibot", "step", "--hidden 32 --dim 16 --k 64 --size 16 --mask random"), ("obow", "teacher", "--k 16"),
    ("moco", "teacher", "--version 3 --encoder vit_micro/8")])
def test_a_teacher_follows_each_step_ever_more_slowly(name, first, flags, tmp_path, monkeypatch):
    """It moves after the optimizer, or before the loss, by an m that rises to 1."""
    module, calls, ms = load(name), [], []
    kind = type(module.build(module.Config(**dict(version=3) if name == "moco" else {})))
    step, update = torch.optim.AdamW.step, kind.update_teacher
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: calls.append("step") or step(self))
    monkeypatch.setattr(kind, "update_teacher", lambda self, m: (
        calls.append("teacher"), ms.append(m), update(self, m)))
    train(name, tmp_path, monkeypatch, *f"--steps 3 --m .9 {flags}".split(), images=16)
    assert calls == 3 * [first, *{"step", "teacher"} - {first}]
    assert ms == pytest.approx([cosine(i, 3, .9, 1.) for i in range(3)])


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


def dark(module, monkeypatch):
    """Its test images are black, which tells them from training images."""
    load_data = module.load_data

    def loaded(cfg, device):
        data = load_data(cfg, device)
        return data._replace(test_images=torch.zeros_like(data.test_images))

    monkeypatch.setattr(module, "load_data", loaded)


@pytest.mark.parametrize("name, function", [("rotnet", "failures"), ("jigsaw", "puzzles"), ("beit", "report"),
                                            ("context_prediction", "pairs_right"), ("mae", "painted")])
def test_what_is_measured_and_shown_is_of_test_images(name, function, tmp_path, monkeypatch):
    module, seen = load(name), []
    measure = getattr(module, function)
    monkeypatch.setattr(module, function, lambda m, x, *more: seen.append(x) or measure(m, x, *more))
    dark(module, monkeypatch)
    train(name, tmp_path, monkeypatch, "--steps", "1", images=16)
    assert seen and not any(x.any() for x in seen)


def test_histograms_and_vocabulary_are_of_training_images(tmp_path, monkeypatch):
    """iGPT: histograms of training images, judged on test images. Video colorization: its vocabulary."""
    igpt, video, seen, words = load("igpt"), load("video_colorization"), [], []
    nats, vocabulary = igpt.histogram_nats, video.vocabulary
    monkeypatch.setattr(igpt, "histogram_nats", lambda x, y, k: seen.append((x, y)) or nats(x, y, k))
    monkeypatch.setattr(video, "vocabulary", lambda x, *more: words.append(x) or vocabulary(x, *more))
    inputs = given(igpt, monkeypatch)
    for module in (igpt, video):
        dark(module, monkeypatch)
    train("igpt", tmp_path, monkeypatch, "--steps", "1", images=16)
    train("video_colorization", tmp_path, monkeypatch, "--steps", "1", images=16)
    assert all(len(x.unique()) > 1 == len(y.unique()) for x, y in seen) and len(seen) == 2
    assert inputs[0][0].std() > .1 and all((x == x[:1, :, :1, :1]).all() for x, in inputs[1:]) and inputs[1:]
    assert len(words) == 1 and words[0].any()


@pytest.mark.parametrize("name", ["slot_attention", "dinosaur"])
def test_masks_before_training_are_not_those_after_it(name, tmp_path, monkeypatch):
    """Which is which, in what is scored."""
    module, seen, found = load(name), [], {}
    segment = module.segment
    monkeypatch.setattr(module, "segment", lambda *a: seen.append(segment(*a)) or seen[-1])
    monkeypatch.setattr(module, "compare", lambda masks, *more: found.update(masks) or {})
    train(name, tmp_path, monkeypatch, "--steps", "1", *UNTAUGHT.get(name, []), images=16)
    (before, _), (masks, a) = seen
    assert not before.equal(masks) and found["untrained"].equal(before)
    assert found["masks"].equal(masks) and found["attention"].equal(a)


def test_spots_masks_before_training_are_not_those_after_it(tmp_path, monkeypatch):
    spot, seen, found = load("spot"), [], {}
    segment = spot.SPOT.segment
    monkeypatch.setattr(spot.SPOT, "segment", lambda *a: seen.append(segment(*a)) or seen[-1])
    monkeypatch.setattr(spot, "compare", lambda masks, *more: found.update(masks) or {})
    flags = "--no-pretrain --image_size 16 --steps 4 --lr .01".split()
    train("spot", tmp_path, monkeypatch, *flags, images=16)
    before, after = seen[0]["A_DEC, teacher"], seen[-1]
    size = found["untrained"].shape[3]
    assert found["untrained"].equal(enlarge(before, size))
    assert all(found[who][-len(y):].equal(enlarge(y, size)) for who, y in after.items()) and len(after) == 4


@pytest.mark.parametrize("name", ["slot_attention", "dinosaur", "spot"])
def test_failures_of_slots_are_printed(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load(name), "complaints", lambda masks: [f"{masks.ndim} axes"])
    train(name, tmp_path, monkeypatch, "--steps", "1", *UNTAUGHT.get(name, []), images=16)
    assert "WARNING: 4 axes" in capsys.readouterr().out


def test_dino_scores_its_own_attention_and_that_before_training(tmp_path, monkeypatch):
    dino, seen = load("dino"), []
    attend = dino.attend

    def counted(encoder, x, masks):
        a, shown, _ = attend(encoder, x, masks)
        seen.append(encoder)
        return a, shown, torch.full((len(x),), float(len(seen)))

    monkeypatch.setattr(dino, "attend", counted)
    method, _, log = train("dino", tmp_path, monkeypatch, "--steps", "1", images=16)
    assert [log["finished"][key] for key in ("iou", "iou_untrained")] == [
        1. + [e is method.encoder for e in seen].index(own) for own in (True, False)]


def test_spot_draws_its_orders(tmp_path, monkeypatch):
    """Those of student and teacher, anew for each step; --no-permutations: one."""
    spot = load("spot")
    for flags, least, most in (([], 12, 81), (["--no-permutations"], 1, 1)):
        with monkeypatch.context() as patch:
            seen = given(spot, patch)
            words = "--no-pretrain --image_size 16 --decoder autoregressive --steps 20".split()
            train("spot", tmp_path, patch, *words, *flags, images=8)
        orders = [inputs[1:] for inputs in seen[:20]]
        assert least <= len(set(orders)) <= most and all(0 <= i < 9 for pair in orders for i in pair)
        assert flags == [] or set(orders) == {(0, 0)}


def test_frames_of_a_clip_come_in_their_order(tmp_path, monkeypatch):
    """Four of six, the last of which copies from those before it; which ones is drawn for each clip."""
    video = load("video_colorization")
    load_data, seen = video.load_data, given(video, monkeypatch)

    def rising(cfg, device):                                     # the clips, not the stills of the table
        data, light = load_data(cfg, device), 20 + 30 * torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
        return data._replace(images=light.expand_as(data.images)) if "frames" in cfg.data else data

    monkeypatch.setattr(video, "load_data", rising)
    train("video_colorization", tmp_path, monkeypatch, "--steps", "1", images=16)
    light = seen[0][0].mean((2, 3, 4))                           # [B,4]
    assert (light.diff(dim=1) > .1).all() and len(light.unique(dim=0)) > 3


REACH = dict(moco=dict(tau=.3, splits=2, shuffle=False), swav=dict(tau=.3, eps=.02, iterations=7),
             dino=dict(tau_s=.3, centering=False), ibot=dict(tau_s=.3),
             instdisc=dict(tau=.3, negatives=3, keep=.2, proximal=7.), obow=dict(kappa=3.),
             exemplar_cnn=dict(margin=.3), transfer=dict(smoothing=.3))


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
