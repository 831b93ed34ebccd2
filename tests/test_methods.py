"""What every method must do: a new file in methods/ is tested by being there. Then what each must do."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from running import METHODS, UNTAUGHT, Lookup, given, load, train
from torch import nn

import common
from kernels.encoders import create_encoder
from kernels.views import normalise

WHOLE = "ibot", "jigsaw", "obow"         # with half a batch their losses do not fall in thirty steps


@pytest.mark.parametrize("name", METHODS)
def test_one_step(name, tmp_path, monkeypatch):
    """A finite loss; every trained weight gets a gradient and has an optimizer, which a checkpoint holds, and
    no target does. iGPT's output table starts at zero, which no gradient passes: its second step."""
    flags, begin = ["--steps", "2" if name == "igpt" else "1", *UNTAUGHT.get(name, [])], common.Run.start

    def start(self, method, data, reference, *optimizers):
        held = [id(p) for one in optimizers for group in one.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in method.parameters() if p.requires_grad)
        return begin(self, method, data, reference, *optimizers)

    monkeypatch.setattr(common.Run, "start", start)
    method, losses, _ = train(name, tmp_path, monkeypatch, *flags, images=32)
    assert math.isfinite(losses[0])
    for weight, p in method.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, weight
        else:
            assert p.grad is None, weight


@pytest.mark.parametrize("name", METHODS)
def test_thirty_steps_lower_the_loss_on_one_batch(name, tmp_path, monkeypatch):
    """DINO's teacher and centre stand still for it; SwAV's loss can fall far with its paper's temperature."""
    flags = (UNTAUGHT | dict(dino=["--m", "1", "--no-centering"], swav=["--tau", ".1"])).get(name, [])
    _, losses, _ = train(name, tmp_path, monkeypatch, "--steps", "30", *flags,
                         images=64 if name in WHOLE else 32)
    assert sum(losses[-5:]) < .97 * sum(losses[:5])


@pytest.mark.parametrize("name", METHODS)
def test_paper_values_build(name):
    module = load(name)
    with torch.device("meta"):
        method = module.build(module.Config(**module.PAPER))
    size = sum(p.numel() for p in method.encoder.parameters())
    assert size > (300_000 if name == "slot_attention" else 10_000_000)  # four convolutions, in the paper too


@pytest.mark.parametrize("name", METHODS)
def test_takes_any_encoder(name):
    """The method itself asks of its encoder no more than .dim, or a ViT's public seams."""
    module = load(name)
    method = module.build(module.Config(image_size=32))
    assert method.encoder(torch.zeros(2, 3, 32, 32)).shape == (2, method.encoder.dim)


@pytest.mark.parametrize("name", ["colorization", "split_brain", "context_encoder", "video_colorization"])
def test_a_vits_features_are_of_the_patches_that_learn(name):
    """No loss of theirs reaches [CLS]."""
    module = load(name)
    encoder = module.build(module.Config(encoder="vit_micro/8")).encoder
    vit = next(m for m in encoder.modules() if hasattr(m, "cls_token"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(vit(x), vit.layers(x)[-1].mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize("name", ["slot_attention", "pixelcnn", "igpt"])
def test_an_encoder_that_cannot_be_chosen_is_refused(name):
    with pytest.raises(SystemExit, match="--encoder resnet18 does not fit"):
        load(name).build(load(name).Config(encoder="resnet18"))
    with pytest.raises(SystemExit, match="--weights does not fit"):
        load(name).build(load(name).Config(weights="any.pt"))


@pytest.mark.parametrize("name, flags, why", [
    ("pixelcnn", dict(width=40), "--width 40 would show"), ("pixelcnn", dict(layer=6), "--layer 6: give 1"),
    ("igpt", dict(depth=3), "--layer 4: give 1 to 3"), ("igpt", dict(heads=3), "--width 64 is no multiple"),
    ("beit", dict(weights="any.pt"), "--weights does not fit"),
    ("beit", dict(mask_ratio=.005), "hides no patch"),
    ("ibot", dict(encoder="resnet_small"), "no ViT"), ("ibot", dict(mask="attmask_hint"), "of 16 patches"),
    ("ibot", dict(size=15), "--size 15, --size_local 16: few pixels for patches of 8"),
    ("dino", dict(encoder="vit_small/16", image_size=224), "--size 24, --size_local 16: few pixels"),
    ("dino", dict(encoder="vit_micro/8", size_local=6), "--size 24, --size_local 6: few pixels"),
    ("dinosaur", dict(encoder="resnet18"), "no ViT"), ("spot", dict(encoder="resnet18"), "no ViT"),
    ("spot", dict(tune=5), "--tune 5: the encoder has 4 blocks"),
    ("context_encoder", dict(image_size=36), "does not fit: its map, doubled"),
    ("context_encoder", dict(overlap=8), "--overlap 8 leaves nothing to hide")])
def test_flags_that_do_not_fit_are_refused_in_one_line(name, flags, why):
    with pytest.raises(SystemExit, match=why) as e:
        load(name).build(load(name).Config(**flags))
    assert "\n" not in e.value.code


@pytest.mark.parametrize("name, flags", [("simsiam", "--layers 0"), ("split_brain", "--cell 0"),
                                         ("simmim", "--square 0"), ("beit", "--first 0"),
                                         ("exemplar_cnn", "--dropout 2")])
def test_numbers_that_no_method_can_use_are_refused(name, flags, capsys):
    with pytest.raises(SystemExit) as e:
        common.parse(load(name).Config, load(name).PAPER, flags.split())
    assert e.value.code == 2 and f"error: {flags.split()[0]} is" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"video_colorization"}))
def test_clips_are_refused_by_all_methods_but_one(name, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="clips, which video_colorization.py alone"):
        train(name, tmp_path, monkeypatch, "--data", "toys:frames=2,n=64", *UNTAUGHT.get(name, []))


@pytest.mark.parametrize("name", ["simmim", "dino", "spot"])
def test_a_clip_of_0_clips_nothing(name, tmp_path, monkeypatch):
    method, _, _ = train(name, tmp_path, monkeypatch, "--steps", "1", "--clip", "0",
                         *UNTAUGHT.get(name, []))
    assert sum(p.grad.abs().sum() for p in method.parameters() if p.grad is not None) > 0


def test_mae_keeps_weights_that_it_is_given(tmp_path):
    """It starts an untrained encoder its own way, and no other."""
    module, file = load("mae"), tmp_path / "encoder.pt"
    given = module.build(module.Config()).encoder.state_dict()
    torch.save(given, file)
    torch.manual_seed(1)
    other, loaded = (module.build(module.Config(weights=w)).encoder.state_dict() for w in ("", str(file)))
    assert all(loaded[k].equal(given[k]) for k in given)
    copied = create_encoder("vit_micro", 32, positions="sincos")
    before = {k: v.clone() for k, v in copied.state_dict().items()}
    assert all(v.equal(before[k]) for k, v in module.MAE(copied).encoder.state_dict().items())
    assert not other["blocks.0.mlp.fc1.weight"].equal(given["blocks.0.mlp.fc1.weight"])


def test_exemplars_stem_is_that_of_its_patches():
    module = load("exemplar_cnn")
    with torch.device("meta"):
        encoder = module.build(module.Config(**module.PAPER)).encoder
        assert encoder.layers(torch.zeros(1, 3, 32, 32))[-1].shape[2:] == (4, 4)


@pytest.mark.parametrize("name", "simclr moco byol simsiam swav barlow_twins vicreg dino ibot".split())
def test_two_views_of_an_image_are_two(name, tmp_path, monkeypatch):
    """The model is given two views of one size, each drawn by itself."""
    seen = given(load(name), monkeypatch)
    train(name, tmp_path, monkeypatch, "--steps", "1", images=32)
    v1, v2 = seen[0][:2]
    assert v1.shape == v2.shape and (v1 != v2).flatten(1).any(1).all()


def test_flags_reach_the_loss():
    simclr, vicreg, barlow, mae = (load(x) for x in ("simclr", "vicreg", "barlow_twins", "mae"))
    method = simclr.build(simclr.Config(hidden=24, dim=12, tau=.3))
    widths = [p.shape for p in method.projector.parameters() if p.ndim > 1]
    assert method.tau == .3 and widths[0][0] == 24 and widths[-1] == (12, 24)
    config = vicreg.Config(invariance=1., variance=2., covariance=3.)
    assert vicreg.build(config).weights == (1, 2, 3) and barlow.build(barlow.Config(lam=.7)).lam == .7
    _, mask = mae.build(mae.Config(mask_ratio=.25)).reconstruct(torch.randn(2, 3, 32, 32))
    assert mask.float().mean() == .25


# ---- supervised, rotnet

def test_supervised_predicts_with_the_statistics_of_training():
    method, x = load("supervised").build(load("supervised").Config()), torch.randn(6, 3, 32, 32)
    method.encoder.bn1.running_mean += 1                         # unlike those of any batch
    told = method.eval().classifier(method.encoder(x)).argmax(1)
    assert method.train().predict(x).equal(told) and method.train().predict(x[:1]).equal(told[:1])


def test_rotnet_turns_counter_clockwise_without_interpolation():
    x = torch.arange(16.).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    turned, k = load("rotnet").four_turns(x)
    assert k.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and torch.equal(turned[:2], x)
    assert turned[2, 0].tolist() == [[3, 7, 11, 15], [2, 6, 10, 14], [1, 5, 9, 13], [0, 4, 8, 12]]
    assert torch.equal(turned[4:6], x.flip(2).flip(3)) and torch.equal(turned[6:], x.mT.flip(3))


def test_rotnet_shows_its_mistakes_alone():
    rotnet = load("rotnet")
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    turned, k = rotnet.four_turns(images)
    right = nn.functional.one_hot(k, 4).float()
    for wrong in ([], [3, 7, 19], list(range(20))):
        said = right.clone()
        said[wrong] = right[wrong].roll(1, 1)
        method = SimpleNamespace(eval=int, encoder=nn.Identity(), classifier=lambda x, said=said: said)
        rows, accuracy = rotnet.failures(method, images)
        assert accuracy == pytest.approx(100 - 5 * len(wrong)) and bool(rows) == bool(wrong)
        if wrong:
            shown = [[torch.equal(x, y) for y in turned].index(True) for x in rows["seen"]]
            assert len(shown) == min(10, len(wrong)) and set(shown) <= set(wrong)


def test_rotnet_cannot_do_better_than_ln_4_where_all_turns_look_alike():
    method = load("rotnet").build(load("rotnet").Config())
    x = torch.rand(5, 3, 1, 1).expand(5, 3, 32, 32)
    assert method.eval()(x) >= math.log(4) - 1e-6                # Jensen: the mean over k of -log p_k
    nn.init.zeros_(method.classifier.weight)
    nn.init.zeros_(method.classifier.bias)
    assert method(torch.rand(5, 3, 32, 32)).item() == pytest.approx(math.log(4), abs=1e-6)


def test_supervised_starts_at_ln_classes_and_refuses_other_classes(tmp_path):
    module = load("supervised")
    method = module.build(module.Config())
    nn.init.zeros_(method.classifier.weight)
    nn.init.zeros_(method.classifier.bias)
    loss = method(torch.rand(6, 3, 32, 32), torch.arange(6))
    assert loss.item() == pytest.approx(math.log(10), abs=1e-6)
    with pytest.raises(SystemExit, match="give --classes 10"):
        module.main(module.Config(data="toys:n=100", batch_size=50, classes=7, out=str(tmp_path)))


def test_supervised_shows_the_classes_that_it_tells(tmp_path, monkeypatch):
    """Even if none is among the first ten."""
    module, drawn = load("supervised"), []
    def classes(cfg, device):
        data = common.load_data(cfg)
        return data._replace(classes=tuple(f"class {i}" for i in range(12)))
    monkeypatch.setattr(module, "load_data", classes)
    monkeypatch.setattr(module.Supervised, "predict", lambda self, x: torch.full((len(x),), 11))
    monkeypatch.setattr(common, "save_grid", lambda path, rows, note: drawn.append(rows))
    train("supervised", tmp_path, monkeypatch, "--classes", "12", "--steps", "1")
    assert list(drawn[0]) == ["class 11"] and len(drawn[0]["class 11"]) == 10


# ---- simclr

def test_simclr_value_before_training():
    """Isotropic z: ln(2N-1) + 1/(2 D tau^2), here 6.254 for N=256, D=128, tau=.5."""
    torch.manual_seed(0)
    method = load("simclr").SimCLR(Lookup(128), tau=.5)
    method.projector = nn.Identity()
    v1, v2 = torch.randn(2, 256, 3, 8, 8)
    assert method(v1, v2).item() == pytest.approx(math.log(511) + 1 / (2 * 128 * .25), abs=.013)
    assert method(v1, v1).item() < 4.5                           # aligned views: far below


def test_simclr_pairs_the_views_of_one_image():
    """Orthogonal images, aligned views: each row has 1 positive at cosine 1 and 2N-2 others at 0."""
    method = load("simclr").SimCLR(Lookup(4), tau=1.)
    method.projector = nn.Identity()
    v = torch.eye(4).view(4, 1, 2, 2).repeat(1, 3, 1, 1)
    assert method(v, 2 * v).item() == pytest.approx(math.log(math.e + 6) - 1, abs=1e-5)


def test_simclr_with_only_some_transformations():
    """View 1 has them, view 2 is the image; a name that is none is refused."""
    module, x = load("simclr"), torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    options = dict(scale=(.2, 1.), jitter=(.4, .4, .4, .1), grey=.2, blur=0.)
    assert torch.equal(module.views(x, **options | module.NONE), normalise(x))
    flipped = module.views(x, **module.only("flip,flip", options))
    same = (flipped == normalise(x)).flatten(1).all(1)
    assert 0 < same.sum() < 40 and torch.equal(flipped[~same], normalise(x[~same].flip(3)))
    both = module.only("crop,color", options)
    assert module.only("crop,blur", options | dict(scale=(.08, 1.), blur=.1))["scale"] == (.08, 1.)
    assert [module.only("blur", options | dict(blur=p))["blur"] for p in (0., .1)] == [.5, .1]
    assert (both["scale"], both["p_jitter"], both["flip"], both["grey"]) == ((.2, 1.), .8, 0., 0.)
    with pytest.raises(SystemExit, match="--only sobel is unknown: give some of crop,flip,color"):
        module.only("crop,sobel", options)


def test_simclr_matrix_has_a_run_for_each_pair(tmp_path, monkeypatch):
    module, pairs = load("simclr"), []
    monkeypatch.setattr(module, "main", lambda cfg: pairs.append(cfg.only) or dict(linear=10. * len(pairs)))
    module.matrix(module.Config(out=str(tmp_path), matrix=True))
    assert len(pairs) == len(set(pairs)) == 6 * 7 // 2 and pairs[:2] == ["crop,crop", "crop,flip"]
    assert (tmp_path / "matrix.png").stat().st_size > 10_000


def test_simclr_matrix_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """--resume: the pairs that have begun are resumed, the others begin."""
    module, resumed = load("simclr"), []
    monkeypatch.setattr(module, "main", lambda cfg: resumed.append(cfg.resume) or dict(linear=50.))
    for pair in "00", "01":
        (tmp_path / "matrix" / pair / "simclr-toys-seed0").mkdir(parents=True)
        (tmp_path / "matrix" / pair / "simclr-toys-seed0" / "checkpoint.pt").touch()
    for resume in True, False:
        module.matrix(module.Config(out=str(tmp_path), matrix=True, resume=resume))
    assert resumed == [True] * 2 + [False] * 19 + [False] * 21


# ---- byol

def test_byol_loss_is_the_sum_of_both_directions():
    """What is predicted from one view is compared with the slow copy's projection of the other."""
    torch.manual_seed(0)
    method = load("byol").BYOL(Lookup(6), hidden=8, dim=5).eval()
    for p in method.teacher.parameters():                        # not equal to the student
        p.data.normal_()
    v, by_hand = torch.randn(2, 7, 3, 4, 4), 0.
    for a, b in (v, v.flip(0)):
        p, t = method.predictor(method.projector(method.encoder(a))), method.teacher(b)
        by_hand += (F.normalize(p, dim=1) - F.normalize(t, dim=1)).square().sum(1).mean().item()
    assert method(*v).item() == pytest.approx(by_hand, rel=1e-5)


def test_byol_direction_is_the_squared_distance_of_unit_vectors():
    direction = load("byol").direction
    p, t = torch.randn(2, 50, 16, dtype=torch.float64)
    unit = F.normalize(p, dim=1) - F.normalize(t, dim=1)
    assert direction(p, t).item() == pytest.approx(unit.square().sum(1).mean().item(), abs=1e-12)
    assert direction(p, 3 * p).item() == pytest.approx(0, abs=1e-12)
    assert direction(p, -p).item() == pytest.approx(4, abs=1e-12)


def test_byol_teacher_is_an_average_of_weights_only():
    """After a step the teacher has moved by (1-m) of the student's step; BatchNorm's buffers are its own."""
    module = load("byol")
    method = module.build(module.Config())
    before = [p.clone() for p in method.teacher.parameters()]
    student = list(nn.Sequential(method.encoder, method.projector).parameters())
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], .1)
    method(*torch.rand(2, 8, 3, 32, 32)).backward()
    optimizer.step()
    buffers = [b.clone() for b in method.teacher.buffers()]
    method.update_teacher(.9)
    for t, old, s in zip(method.teacher.parameters(), before, student, strict=True):
        assert torch.allclose(t, .9 * old + .1 * s, atol=1e-7) and t.grad is None
    assert all(torch.equal(a, b) for a, b in zip(buffers, method.teacher.buffers(), strict=True))
    assert all(b.sum() > 0 for n, b in method.teacher.named_buffers() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("m, share", [("0", 0.), ("1", 1.)])
def test_byol_with_the_momentum_0_or_1_has_that_to_the_end(m, share, tmp_path, monkeypatch):
    """0: the teacher is the student; 1: it stays as it was drawn."""
    method, _, log = train("byol", tmp_path, monkeypatch, "--steps", "3", "--m", m)
    torch.manual_seed(0)
    drawn = load("byol").build(load("byol").Config())
    known = drawn if share else method
    student = nn.Sequential(known.encoder, known.projector)
    assert log["m"] == share
    for t, s in zip(method.teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(t, s)


def test_byol_collapses_without_predictor_and_slow_teacher(tmp_path, monkeypatch, capsys):
    """Predictor and slow teacher keep the constant away: without them the std monitor falls, and it warns."""
    flags = "--steps", "60", "--lr", "3e-3", "--encoder", "resnet_small"
    _, _, kept = train("byol", tmp_path / "a", monkeypatch, *flags, images=32)
    _, losses, log = train("byol", tmp_path / "b", monkeypatch, *flags, "--no-predictor", "--m=0", images=32)
    assert log["z_std"] < .05 < .5 < kept["z_std"] and losses[-1] < .1
    assert "WARNING" in capsys.readouterr().out


# ---- mae

def test_mae_tells_hidden_patches_apart_by_their_places():
    """Mask tokens are alike, so that nothing else can; the encoder's positions are fixed."""
    method = load("mae").build(load("mae").Config()).eval()
    out, mask = method.reconstruct(torch.randn(2, 3, 32, 32))
    hidden = out[0][mask[0]]                                     # [M,P]
    assert torch.pdist(hidden).min() > 1e-4
    assert not method.encoder.pos_embed.requires_grad and not method.encoder.pos_embed[0, 0].any()


def test_mae_mask_hides_the_ratio_and_restore_undoes_the_shuffle():
    mask, keep, restore = load("mae").random_mask(50, 64, .75, "cpu")
    assert (mask.sum(1) == 48).all() and keep.shape == (50, 16)
    assert not mask.gather(1, keep).any() and len(mask.unique(dim=0)) == 50
    order = restore.argsort(1)
    tokens = torch.randn(50, 64)
    assert torch.equal(order[:, :16], keep)
    assert torch.equal(tokens.gather(1, order).gather(1, restore), tokens)
    share = mask.float().mean(0)                                 # no place is favoured: 5 sigma of 50 draws
    assert (share - .75).abs().max() < 5 * (.75 * .25 / 50) ** .5


def test_mae_predicting_the_patch_mean_costs_p_minus_1_over_p():
    """Targets are normalised by the unbiased variance of a patch, so a zero prediction costs 47/48."""
    module = load("mae")
    method = module.build(module.Config())
    nn.init.zeros_(method.decoder[-1].weight)
    nn.init.zeros_(method.decoder[-1].bias)
    assert method(torch.randn(8, 3, 32, 32)).item() == pytest.approx(47 / 48, abs=1e-4)


def test_mae_patches_are_rows_of_the_image_and_come_back():
    module = load("mae")
    x = torch.arange(2 * 3 * 8 * 8.).view(2, 3, 8, 8)
    t = module.patchify(x, 4)
    assert t.shape == (2, 4, 48)
    assert t[1, 1, :6].tolist() == [196, 260, 324, 197, 261, 325]        # pixel by pixel, each r g b
    assert torch.equal(module.unpatchify(t, 4, 8), x)


def test_mae_sees_only_kept_patches_and_pays_only_for_hidden_ones():
    module = load("mae")
    method, x = module.build(module.Config()).eval(), torch.randn(4, 3, 32, 32)
    torch.manual_seed(3)
    prediction, mask = method.reconstruct(x)
    patches = module.patchify(x, 4)
    for where, same in ((mask, True), (~mask, False)):
        other = torch.where(where[..., None], torch.randn_like(patches), patches)
        torch.manual_seed(3)
        again, _ = method.reconstruct(module.unpatchify(other, 4, 32))
        assert torch.allclose(again, prediction, atol=1e-5) == same
    torch.manual_seed(3)
    loss = method(x)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    by_hand = [(prediction[b, n] - target[b, n]).square().mean() for b, n in mask.nonzero().tolist()]
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_mae_mask_tokens_stand_at_the_hidden_places():
    """With projection, decoder and positions switched off, a kept token comes out where it went in."""
    module = load("mae")
    method = module.build(module.Config()).eval()
    method.encoder.encode = method.encoder.prepend
    method.project, method.decoder = nn.Identity(), nn.Identity()
    method.mask_token, method.positions = nn.Parameter(torch.full((1, 1, 128), 7.)), torch.zeros(())
    x = torch.randn(3, 3, 32, 32)
    tokens, (out, mask) = method.encoder.embed(x), method.reconstruct(x)
    assert torch.allclose(out[~mask], tokens[~mask]) and (out[mask] == 7).all()
