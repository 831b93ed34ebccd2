"""Slot Attention, DINOSAUR and SPOT: their losses by hand, what is frozen, what teaches what."""
import itertools
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from running import load, train

from kernels.decoders import axes, quadratic
from kernels.slots import enlarge

SMALL = dict(image_size=16, k=3, dim=8)


def small(name, **options):
    module = load(name)
    torch.manual_seed(0)
    return module, module.build(module.Config(**SMALL, **options))


def x(n=4, seed=1):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# ---- slot attention

def test_slot_attention_paints_the_sum_of_masked_parts():
    _, method = small("slot_attention")
    method.eval()
    torch.manual_seed(0)
    rgb, masks, a = method.parts(x())
    assert rgb.shape == (4, 3, 3, 16, 16) and a.shape == (3, 4, 3, 64)
    assert torch.allclose(masks.sum(1), torch.ones(4, 1, 16, 16))
    painted = torch.stack([sum(masks[b, i] * rgb[b, i] for i in range(3)) for b in range(4)])
    torch.manual_seed(0)
    assert method(x()).item() == pytest.approx((painted - x()).square().mean().item(), rel=1e-6)


def test_slot_attention_starts_from_a_gaussian_or_from_learned_queries():
    """--queries: nothing is drawn, the slots differ, and all rounds teach them."""
    _, drawn = small("slot_attention")
    _, learned = small("slot_attention", queries=True)
    for method, same in ((drawn, False), (learned, True)):
        first, second = (method.parts(x())[1] for _ in range(2))
        assert torch.equal(first, second) == same
    assert drawn.slots.mu.shape == (1, 1, 8) and learned.slots.mu.shape == (1, 3, 8)
    assert not learned.slots.bilevel
    learned(x()).backward()
    assert (learned.slots.mu.grad[0].norm(dim=1) > 0).all()


def test_slot_attention_counts_positions_in_the_frame_of_attention():
    """relative: the decoder is given mean and spread of what the slot attends to; else the middle, and 1."""
    for relative in (True, False):
        _, method = small("slot_attention", relative=relative)
        seen, decoder = [], method.decoder.forward
        method.decoder.forward = lambda s, *f, seen=seen, decoder=decoder: seen.append(f) or decoder(s, *f)
        _, _, a = method.parts(x())
        a = a[-1][1, 2]                                          # image 1, slot 2: [N]
        at = load("slot_attention").axes(8)
        centre, spread = (f.expand(4, 3, 2)[1, 2] for f in seen[0])
        mean = (a[:, None] * at).sum(0) / a.sum()
        std = ((a[:, None] * (at - mean).square()).sum(0) / a.sum() + .01).sqrt()
        assert torch.allclose(centre, mean if relative else torch.zeros(2), atol=1e-4)
        assert torch.allclose(spread, std if relative else torch.ones(2), atol=1e-4)


# ---- dinosaur

def test_dinosaur_tells_the_last_block_before_its_norm_and_leaves_the_encoder_alone(tmp_path, monkeypatch):
    module, method = small("dinosaur", norm=False)
    v, encoder = x(), method.encoder
    tokens = encoder.prepend(encoder.embed(F.interpolate(v, size=(32, 32), mode="bilinear")))
    for block in encoder.blocks:
        tokens = block(tokens)
    h = method.features(v)
    assert torch.allclose(h, tokens[:, 1:], atol=1e-5) and not h.requires_grad
    method.decoder.forward = lambda s, h, frame: (torch.zeros_like(h), torch.full((4, 3, 16), 1 / 3))
    assert method(v).item() == pytest.approx(h.square().mean().item(), rel=1e-5)
    method, _, _ = train("dinosaur", tmp_path, monkeypatch, "--steps", "2", "--no-pretrain")
    torch.manual_seed(0)
    fresh = module.build(module.Config())
    assert all(torch.equal(a, b) for a, b in zip(method.encoder.parameters(), fresh.encoder.parameters(),
                                                 strict=True))


@pytest.mark.parametrize("name", ["dinosaur", "spot"])
def test_norm_leaves_no_mean_and_unit_deviation_in_each_patch(name):
    h, h0 = (small(name, norm=norm)[1].features(x()) for norm in (True, False))
    h, h0 = (h, h0) if name == "dinosaur" else (h[0], h0[0])
    one, h0 = torch.ones(4, 16), h0 - h0.mean(2, keepdim=True)
    assert h.mean(2).abs().max() < 1e-5 and torch.allclose(h.var(2, correction=0), one, atol=1e-2)
    assert torch.allclose(F.cosine_similarity(h, h0, 2), one, atol=1e-5)


@pytest.mark.parametrize("name", ["dinosaur", "spot"])
def test_dino_trains_the_encoder_once_and_its_failure_is_told(name, tmp_path, monkeypatch):
    """The command is one that dino.py understands; what it has written is taken the second time."""
    module, dino, common, ran, status = load(name), load("dino"), load("common"), [], 0

    def run(command, check):
        ran.append(command[1:])
        if not status:
            told = common.parse(dino.Config, dino.PAPER, command[2:])
            file = common.Run(told, dino.__file__).folder / "encoder.pt"
            file.touch()
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", run)
    cfg = module.Config(seed=3, out=str(tmp_path))
    file = module.pretrained(cfg)
    assert file == module.pretrained(cfg) and Path(file).exists() and len(ran) == 1
    assert ran[0][0] == Path(dino.__file__) and "--seed=3" in ran[0]
    status = 1
    with pytest.raises(SystemExit, match="no vit_micro/8: give it by --weights, or run it"):
        module.pretrained(module.Config(seed=4, out=str(tmp_path)))
    with pytest.raises(SystemExit, match="dino.py has trained no vit_base/16: give it by --weights$"):
        module.pretrained(module.Config(encoder="vit_base/16", seed=3, out=str(tmp_path)))


@pytest.mark.parametrize("decoder", ["mlp", "autoregressive"])
def test_dinosaur_learns_with_either_decoder(decoder, tmp_path, monkeypatch):
    _, losses, _ = train("dinosaur", tmp_path, monkeypatch, "--steps", "15", "--no-pretrain", "--decoder",
                         decoder)
    assert losses[-1] < .9 * losses[0]


@pytest.mark.parametrize("name", ["dinosaur", "spot"])
def test_an_unknown_decoder_is_refused(name):
    with pytest.raises(SystemExit, match="--decoder magic.*: give"):
        small(name, decoder="magic")


@pytest.mark.parametrize("name", ["dinosaur", "spot"])
def test_heads_that_do_not_fit_the_decoder_are_refused(name):
    with pytest.raises(SystemExit, match="--heads.*128"):
        small(name, decoder="autoregressive", heads=5)


@pytest.mark.parametrize("name", ["dinosaur", "spot"])
def test_a_run_keeps_no_path_of_the_encoder_it_found(name, tmp_path, monkeypatch):
    """So that its folder may move; what it has learned there is in the checkpoint."""
    module, (here, there) = load(name), (tmp_path / "a", tmp_path / "b")
    for folder in here, there:
        folder.mkdir()
        torch.save(load("dino").build(load("dino").Config(encoder="vit_micro/8")).encoder.state_dict(),
                   folder / "encoder.pt")
    monkeypatch.setattr(module, "pretrained", lambda cfg: f"{cfg.out}/encoder.pt")
    flags = "--image_size", "16", "--steps", "2"
    train(name, here, monkeypatch, *flags, stop=1)
    (folder,) = here.glob(f"{name}-*")
    folder.rename(there / folder.name)
    _, losses, _ = train(name, there, monkeypatch, *flags, "--resume")
    assert len(losses) == 1


# ---- spot

def test_a_teacher_that_takes_the_whole_run_is_refused():
    with pytest.raises(SystemExit, match="leaves no step for the student: give"):
        small("spot", teacher=1.)


def test_all_orders_read_the_same_slots():
    """With an MLP, which knows no order, nine orders are one, though the teacher's slots are drawn."""
    _, method = small("spot")
    method.eval()
    torch.manual_seed(3)
    one = method.segment(x(), 1)
    torch.manual_seed(3)
    nine = method.segment(x(), 9)
    assert all(torch.allclose(one[who], nine[who], atol=1e-6) for who in one)


def test_match_is_the_best_of_all_assignments():
    match, g = load("spot").match, torch.Generator().manual_seed(0)
    t, s = torch.randint(4, (2, 5, 20), generator=g)
    found = match(t, s, 4)
    for b in range(5):
        def iou(i, j, b=b):
            both, either = ((t[b] == i) & (s[b] == j)).sum(), ((t[b] == i) | (s[b] == j)).sum()
            return (both / either.clamp(min=1)).item()
        best = max(sum(iou(i, p[i]) for i in range(4)) for p in itertools.permutations(range(4)))
        assert sum(iou(i, int(found[b, i])) for i in range(4)) == pytest.approx(best, abs=1e-6)


def test_spot_teacher_first_then_student():
    """Stage 1 trains the teacher alone, stage 2 the student alone; its loss is taken by hand here."""
    module, method = small("spot", attention=.5, decoder="autoregressive", tune=2)
    method(x(), 3).backward()
    assert all(p.grad is None for p in method.student.parameters())
    assert any(p.grad is not None for p in method.teacher.parameters())
    method.zero_grad()
    method.graduate()
    torch.manual_seed(5)
    loss = method(x(), 3, 7)
    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.encoder.blocks[-2:].parameters())
    kept = [*method.frozen.parameters(), *method.encoder.blocks[:-2].parameters()]
    assert all(p.grad is None for p in kept)
    h, inputs = method.features(x())
    torch.manual_seed(5)
    told, _, a = method.student(inputs, h, 3)
    y = method.teacher(h, h, 7)[1].argmax(1)                     # [B,N]
    slot = module.match(y, a.argmax(1), 3)
    nll = [-a[b, slot[b, y[b, n]], n].log() for b in range(4) for n in range(16)]
    want = F.mse_loss(told, h) + .5 * torch.stack(nll).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_spot_targets_are_of_the_frozen_encoder_and_inputs_of_its_tuned_blocks():
    """What enters the student's slots is the whole encoder's, as if the two shared nothing."""
    _, method = small("spot", norm=False, tune=2)
    method.graduate()
    h, inputs = method.features(x())
    assert torch.equal(h, inputs.detach()) and inputs.requires_grad and not h.requires_grad
    for p in method.encoder.blocks[-2:].parameters():
        p.data.add_(.1)
    after, inputs = method.features(x())
    assert torch.equal(h, after)
    encoder, v = method.encoder, F.interpolate(x(), size=(32, 32), mode="bilinear")
    assert torch.allclose(inputs, encoder.blocks(encoder.prepend(encoder.embed(v)))[:, 1:], atol=1e-5)


def test_spot_slots_of_teacher_and_student():
    _, method = small("spot")
    assert method.teacher.slots.init == "gaussian" and method.student.slots.init == "queries"
    found = method.eval().segment(x())
    assert list(found) == ["A_DEC, teacher", "A_SLOT, teacher", "A_DEC, student", "A_SLOT, student"]
    assert all(torch.allclose(m.sum(1), torch.ones(4, 16), atol=1e-5) for m in found.values())


@pytest.mark.parametrize("orders", [1, 9])
def test_spots_masks_are_the_decoders_and_the_slots_of_each_network_over_all_orders(orders):
    """By hand. The student sees the tuned encoder, the teacher the frozen one; both masks are of one draw."""
    _, method = small("spot", decoder="autoregressive", tune=2)
    method.eval().graduate()
    for p in method.encoder.blocks[-2:].parameters():
        p.data.add_(.1 * torch.randn_like(p))
    h, inputs = (y.detach() for y in method.features(x()))
    torch.manual_seed(3)
    found = method.segment(x(), orders)
    torch.manual_seed(3)
    with torch.no_grad():
        for who, net, y in (("teacher", method.teacher, h), ("student", method.student, inputs)):
            s, a = net.slots(net.mlp(y))
            masks = sum(net.decoder(s, h, order)[1] for order in range(orders)) / orders
            torch.testing.assert_close(found[f"A_SLOT, {who}"], a[-1])
            torch.testing.assert_close(found[f"A_DEC, {who}"], masks)
    assert (found["A_DEC, student"] - found["A_SLOT, student"]).abs().max() > .01


@pytest.mark.parametrize("name", ["slot_attention", "dinosaur"])
def test_attention_is_that_of_the_last_round(name):
    module, method = small(name)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    method.eval()
    torch.manual_seed(3)
    masks, a = module.segment(method, images)
    torch.manual_seed(3)
    with torch.no_grad():
        v = module.normalise(images)
        inputs = method.features(v) if name == "dinosaur" else method.encoder.layers(v)[-1].flatten(2).mT
        if name == "slot_attention":
            inputs = inputs + method.place(quadratic(axes(int(inputs.shape[1] ** .5))))
        _, maps = method.slots(method.mlp(inputs))
    torch.testing.assert_close(a, enlarge(maps[-1], 16))
    assert (a - enlarge(maps[0], 16)).abs().max() > 1e-3 and masks.shape == a.shape


def test_gradient_norms_are_zero_where_the_slots_do_not_matter():
    module, method = small("spot", decoder="autoregressive")
    h, net = method.features(x())[0], method.teacher
    assert (module.gradient_norms(net, h, h, 0) > 0).all()
    torch.nn.init.zeros_(net.decoder.memory[0].weight)           # the decoder sees no slots any more
    assert (module.gradient_norms(net, h, h, 0) == 0).all()


@pytest.mark.parametrize("decoder", ["autoregressive", "parallel", "mlp"])
def test_spot_runs_through_both_stages_with_each_decoder(decoder, tmp_path, monkeypatch):
    flags = ["--no-pretrain", "--image_size", "16", "--decoder", decoder]
    method, losses, last = train("spot", tmp_path, monkeypatch, "--steps", "4", *flags)
    assert method.graduated and last["att"] > 0 and all(map(torch.isfinite, map(torch.tensor, losses)))
    assert len(losses) == 4


def test_spot_without_a_teacher_learns_by_reconstruction_alone(tmp_path, monkeypatch):
    flags = ["--no-pretrain", "--teacher", "0", "--steps", "1"]
    method, _, last = train("spot", tmp_path, monkeypatch, *flags)
    assert method.graduated and last["att"] == 0 and last["loss"] == last["rec"]


def test_a_teacher_of_no_step_teaches_nothing(tmp_path, monkeypatch):
    method, _, last = train("spot", tmp_path, monkeypatch, "--no-pretrain", "--teacher", ".1", "--steps", "2")
    assert last["att"] == method.weight == 0 and last["loss"] == last["rec"]


@pytest.mark.parametrize("name", ["dinosaur", "spot"])
def test_torchrun_is_refused_before_an_encoder_is_trained(name, tmp_path, monkeypatch):
    monkeypatch.setattr(load("common"), "world", lambda: 2)
    with pytest.raises(SystemExit, match="give it by --weights, or run it"):
        load(name).pretrained(load(name).Config(out=str(tmp_path)))
