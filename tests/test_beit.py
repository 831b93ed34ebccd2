"""BEiT: its masks, its tokenizer, its relative positions, its two stages."""
import math
import time

import pytest
import torch
from running import load, train
from torch import nn

from common import cosine
from kernels.encoders import create_encoder

beit = load("beit")


def small(**options):
    torch.manual_seed(0)
    return beit.BEiT(create_encoder("vit_micro/4", 16, pool="mean"), beit.DVAE(12, 4, 8), **options)


# ---- masks

def test_masks_are_blocks_and_differ():
    masks = beit.draw_masks(beit.Config(), 200, 8, "cpu")
    assert masks.shape == (200, 64) and len(masks.unique(dim=0)) > 190
    m = masks.view(200, 8, 8)
    neighbours = m[:, 1:] & m[:, :-1]                            # of a random mask .4 of the hidden
    assert neighbours.sum() / m[:, 1:].sum() > .7


def test_masks_hide_their_share():
    """None has more, and most spend nearly all of it."""
    count = beit.draw_masks(beit.Config(mask_ratio=.3), 200, 8, "cpu").sum(1)
    assert count.max() == round(.3 * 64) and count.float().mean() > .8 * .3 * 64


# ---- the tokenizer

def test_logit_laplace_is_a_density():
    """exp(-nll) integrates to 1 over the open interval, whatever the mean and the scale."""
    n = 20_000
    x = ((torch.arange(n) + .5) / n).double().view(1, 1, 1, n).expand(1, 3, 1, n)
    mean, ln_b = (torch.tensor(v).double().view(1, 3, 1, 1).expand(1, 3, 1, n) for v in
                  ([-1., 0., 2.], [-1.5, -.5, -1.]))
    dvae = beit.DVAE(5, 4, 8, eps=0.).double()
    dvae.encoder, dvae.decode = nn.Conv2d(3, 5, 1).double(), lambda weights: (mean, ln_b)
    direct = (x.logit() - mean).abs() / ln_b.exp() + ln_b + (2 * x * (1 - x)).log()
    assert torch.allclose((-direct).exp().mean(-1), torch.ones(1, 3, 1).double(), atol=1e-3)
    assert dvae(x, 1., 0.).item() == pytest.approx(direct.mean().item(), rel=1e-12)


def test_kl_to_uniform_is_0_for_uniform_and_ln_k_for_one_word():
    dvae, x = beit.DVAE(12, 4, 8), torch.rand(3, 3, 16, 16)
    last = dvae.encoder[-1]
    nn.init.zeros_(last.weight)
    for bias, kl in ((torch.zeros(12), 0.), (40 * torch.eye(12)[5], math.log(12))):
        last.bias.data = bias
        torch.manual_seed(1)
        without = dvae(x, 1., 0.).item()
        torch.manual_seed(1)
        assert dvae(x, 1., 6.).item() - without == pytest.approx(6 * kl / 48, abs=1e-5)  # 48 values a patch
        assert dvae.perplexity.item() == pytest.approx(1 if kl else 12, rel=1e-4)


def test_the_noise_draws_words_as_often_as_the_softmax_says():
    """At a low temperature the weights are one-hot, and their mean is softmax(logits)."""
    torch.manual_seed(0)
    dvae, heard = beit.DVAE(3, 4, 8), []
    nn.init.zeros_(dvae.encoder[-1].weight)
    dvae.encoder[-1].bias.data = torch.tensor([.5, .3, .2]).log()
    decode = dvae.decode
    dvae.decode = lambda weights: heard.append(weights) or decode(weights)
    dvae(torch.rand(100, 3, 32, 32), 1e-3, 0.)
    assert heard[0].amax(1).mean() > .99
    assert heard[0].mean((0, 2, 3)).tolist() == pytest.approx([.5, .3, .2], abs=5 * (.25 / 6400) ** .5)


def test_tokens_stand_row_by_row_and_come_back():
    """A tokenizer whose words are colours: red, green and blue patches are told, and painted."""
    dvae = beit.DVAE(3, 4, 3)
    dvae.encoder = nn.AvgPool2d(4)
    dvae.decoder = nn.Upsample(scale_factor=4)
    dvae.decode = lambda weights: (20 * dvae.decoder(weights) - 10, 0)
    tokens = torch.tensor([[0, 1, 2, 0, 2, 2]])                  # two rows of three
    x = torch.eye(3)[tokens].view(1, 2, 3, 3).permute(0, 3, 1, 2)
    x = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert dvae.tokens(x).tolist() == tokens.tolist()
    assert torch.allclose(dvae.paint(tokens, 2), x, atol=1e-3)   # sigmoid(10), stretched from .1...9


# ---- relative positions

def test_the_bias_depends_on_the_offset_alone():
    bias = beit.RelativeBias(3, 2)
    assert bias().shape == (2, 10, 10) and not bias().any() and len(bias.table) == 5 * 5 + 3
    bias.table.data = torch.arange(28.)[:, None].expand(28, 2)
    b, offsets = bias()[0], {}
    for i in range(9):
        for j in range(9):
            offset = (i // 3 - j // 3, i % 3 - j % 3)
            assert offsets.setdefault(offset, b[1 + i, 1 + j].item()) == b[1 + i, 1 + j]
    assert len(set(offsets.values())) == len(offsets) == 25
    three = b[0, 1].item(), b[1, 0].item(), b[0, 0].item()
    assert (b[0, 1:] == three[0]).all() and (b[1:, 0] == three[1]).all()
    assert len({*three, *offsets.values()}) == 28


def test_relative_block_is_the_vits_with_scale_1_and_deep_ones_start_small():
    torch.manual_seed(0)
    vit, x = create_encoder("vit_micro/4", 16), torch.randn(2, 17, 128)
    bias, before = beit.RelativeBias(4, 4), vit.blocks[0](x)
    proj, fc2 = vit.blocks[0].attn.proj.weight.clone(), vit.blocks[0].mlp.fc2.weight.clone()
    block = beit.RelativeBlock(vit.blocks[0], bias, layer=3, gamma=1.)
    assert torch.allclose(block.attn.proj.weight, proj / 6 ** .5)
    assert torch.allclose(block.mlp.fc2.weight, fc2 / 6 ** .5)
    block.attn.proj.weight.data, block.mlp.fc2.weight.data = proj, fc2
    assert torch.allclose(block(x), before, atol=1e-5)
    block.gamma_1.data *= 0
    block.gamma_2.data *= 0
    assert torch.equal(block(x), x)


def test_only_the_bias_tells_places_apart():
    """Without it, patches in another order come out in that order; with it they do not."""
    method, x = small().eval(), torch.randn(2, 16, 128)
    order = torch.randperm(16)
    def passes():
        out, other = (method.encoder.encode(t)[:, 1:] for t in (x, x[:, order]))
        return (out[:, order] - other).abs().max().item()
    assert passes() < 1e-5 and not method.encoder.pos_embed.any()
    method.encoder.blocks[0].bias.table.data.normal_(0, 3)
    assert method.encoder.blocks[3].bias.table.data_ptr() == method.encoder.blocks[0].bias.table.data_ptr()
    assert passes() > 1e-3


def test_the_keys_bias_is_inert():
    method, x = small().eval(), torch.randn(2, 3, 16, 16)
    method.encoder.blocks[0].bias.table.data.normal_()
    before = method.encoder(x)
    for block in method.encoder.blocks:
        block.attn.qkv.bias.data[128:256].normal_(0, 3)
    assert torch.allclose(method.encoder(x), before, atol=1e-5)
    method.encoder.blocks[0].attn.qkv.bias.data[256:].normal_()
    assert not torch.allclose(method.encoder(x), before, atol=1e-2)


# ---- the loss

def test_loss_is_of_the_hidden_patches_whose_content_is_not_seen():
    method, x = small().eval(), torch.randn(4, 3, 16, 16)
    mask = beit.draw_masks(beit.Config(least=1), 4, 4, "cpu")
    tokens = method.tokenizer.tokens(beit.denormalise(x))
    logits = method.classifier(method.encoder.encode(method.encoder.embed(x, mask, method.mask_token))[:, 1:])
    by_hand = [-logits[b, n].log_softmax(0)[tokens[b, n]] for b, n in mask.nonzero().tolist()]
    assert method(x, mask).item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    pixels = mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(pixels, torch.randn_like(x), x)
    assert torch.allclose(method.predict(other, mask), method.predict(x, mask), atol=1e-5)
    assert not torch.allclose(method.predict(other, ~mask), method.predict(x, ~mask), atol=1e-2)


def test_a_classifier_that_says_nothing_pays_ln_k_and_the_tokenizer_learns_nothing_more():
    method = small()
    nn.init.zeros_(method.classifier.weight)
    nn.init.zeros_(method.classifier.bias)
    mask = torch.arange(16).expand(2, 16) < 5
    loss = method(torch.randn(2, 3, 16, 16), mask)
    assert loss.item() == pytest.approx(math.log(12), abs=1e-6)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.tokenizer.parameters())


# ---- the two stages

def test_first_stage_trains_the_tokenizer_which_then_stands(tmp_path, monkeypatch):
    """Twelve steps at --first .3 are 4 of the tokenizer: temperature falls, KL's weight rises, then rest."""
    stage, found, seen, forward = beit.first_stage, [], [], beit.DVAE.forward
    monkeypatch.setattr(beit, "first_stage", lambda *a: found.append(stage(*a)) or found[0])
    def spy(self, x, *a):
        seen.append((x.min(), x.max(), *a))
        return forward(self, x, *a)
    monkeypatch.setattr(beit.DVAE, "forward", spy)
    flags = "--steps", "12", "--first", ".3", "--k", "16", "--words_dim", "8", "--beta", "5"
    method, _, _ = train("beit", tmp_path, monkeypatch, *flags, images=16)
    assert len(seen) == 4 and all(0 <= low < high <= 1 for low, high, *_ in seen)
    assert [tau for *_, tau, _ in seen] == sorted((tau for *_, tau, _ in seen), reverse=True)
    assert seen[0][2] == 1 and [beta for *_, beta in seen] == [0, 5, 5, 5]
    for name, value in found[0].state_dict().items():
        assert torch.equal(method.tokenizer.state_dict()[name], value), name


def test_temperature_falls_and_the_weight_of_the_words_rises_in_the_first_stage(tmp_path, monkeypatch):
    """tau from 1 by a cosine, beta in a fifth of the stage."""
    seen, forward = [], beit.DVAE.forward
    monkeypatch.setattr(beit.DVAE, "forward", lambda self, x, tau, beta: (
        seen.append((tau, beta)), forward(self, x, tau, beta))[1])
    flags = "--steps 10 --first 1 --tau .2 --beta 3".split()
    train("beit", tmp_path, monkeypatch, *flags, images=16)
    taus, betas = zip(*seen, strict=True)
    assert taus == pytest.approx([cosine(i, 10, 1., .2) for i in range(10)])
    assert betas == pytest.approx([0., 1.5] + 8 * [3.])


def test_of_several_processes_the_first_gives_the_tokenizer(tmp_path, monkeypatch):
    """Each trains its own, which on a GPU are not the same to the bit."""
    dvae = beit.build(beit.Config(k=8)).tokenizer
    monkeypatch.setattr(beit, "first_stage", lambda *a: dvae)
    monkeypatch.setattr(beit.common, "gather", lambda z: torch.cat([1 + z, z]))
    method, _, _ = train("beit", tmp_path, monkeypatch, "--steps", "1", "--k", "8", images=16)
    assert all(v.equal(1 + dvae.state_dict()[k]) for k, v in method.tokenizer.state_dict().items())


def test_first_stage_is_timed_and_not_repeated_by_a_resumed_run(tmp_path, monkeypatch):
    def slow(cfg, run, images):
        time.sleep(1)
        return beit.build(cfg).tokenizer

    monkeypatch.setattr(beit, "first_stage", slow)
    flags = "--steps", "4", "--k", "8"
    monkeypatch.setattr(beit, "report", lambda *a: ({"x": a[1][:2]}, {}))
    method, losses, log = train("beit", tmp_path, monkeypatch, *flags, images=16, stop=2)
    assert len(losses) == 2 and log["seconds"] > 1
    monkeypatch.setattr(beit, "first_stage", None)
    again, losses, log = train("beit", tmp_path, monkeypatch, *flags, "--resume", images=16)
    assert len(losses) == 2 and torch.equal(again.tokenizer.words, method.tokenizer.words)


def test_a_tokenizer_that_diverges_is_named():
    class Here:
        total, device = 2, "cpu"

    cfg = beit.Config(lr_first=1e30, k=8, batch_size=4)
    with pytest.raises(SystemExit, match="the tokenizer's loss is .*: lower --lr_first"):
        beit.first_stage(cfg, Here(), torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8))


def test_report():
    """Words that are all right, one word in four patches of five, and nothing carried by a grey painting."""
    method, x = small().eval(), torch.rand(20, 3, 16, 16)
    tokens = torch.tensor([3, 3, 3, 3, 5]).repeat(64).view(20, 16)
    mask = torch.rand(20, 16) < .4
    method.tokenizer.tokens = lambda x: tokens
    method.tokenizer.paint = lambda t, h: x.mean((0, 2, 3), keepdim=True).expand_as(x)
    method.classifier, method.predict = nn.Identity(), lambda v, m: torch.eye(12)[tokens] * m[..., None]
    rows, scores = beit.report(method, x, mask)
    assert scores["words_told"] == 1 and scores["commonest_word"] == pytest.approx(.8)
    assert scores["words_in_use"] == pytest.approx(.8 ** -.8 * .2 ** -.2, rel=1e-5)
    assert scores["variance_carried"] == pytest.approx(0, abs=2e-3)
    assert list(rows) == ["seen", "hidden words told", "all words", "x"]
    pixels = mask[:10].view(10, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(rows["seen"], torch.where(pixels, .5, x[:10]))
    method.tokenizer.paint = lambda t, h: x
    method.predict = lambda v, m: torch.eye(12)[torch.full((20, 16), 7)]
    assert beit.report(method, x, mask)[1]["words_told"] == 0
    assert beit.report(method, x, mask)[1]["variance_carried"] == 1
