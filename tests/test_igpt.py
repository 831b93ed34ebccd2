"""iGPT: its colours, who sees whom, what is hidden, the loss, the baselines, and what is drawn."""
import math

import pytest
import torch
from running import load
from torch import nn

from kernels.views import normalise

igpt = load("igpt")


def small(causal=True, k=7, size=4, width=12, depth=3, layer=2, hide=None):
    torch.manual_seed(0)
    method = igpt.IGPT(igpt.GPT(k, size, width, depth, 2, layer, causal), k, hide or (1. if causal else .15))
    method.encoder.centres.copy_(2 * torch.rand(k, 3) - 1)
    nn.init.normal_(method.head.weight)
    for m in method.modules():
        if isinstance(m, nn.RMSNorm):
            nn.init.uniform_(m.weight, .5, 1.5)                  # no two alike
    return method.eval()


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


# ---- colours

def test_tokens_are_the_nearest_colours_in_reading_order():
    """Centres are in [-1,1]: black -1, white 1; and back to pixels."""
    encoder = small(k=3, size=2).encoder
    encoder.centres.copy_(torch.tensor([[-1., -1, -1], [1, 1, 1], [1, -1, -1]]))
    x = torch.tensor([[[0, 255], [200, 90]], [[0, 255], [20, 90]], [[0, 255], [20, 90]]], dtype=torch.uint8)
    assert encoder.tokens(normalise(x[None])).tolist() == [[0, 1, 2, 0]]
    back = encoder.picture(torch.tensor([[0, 1, 2, 0]]))[0]
    assert back.tolist() == [[[0, 1], [1, 0]], [[0, 1], [0, 0]], [[0, 1], [0, 0]]]


def test_centres_are_kept_in_the_checkpoint_and_not_trained():
    trained = dict(small().named_parameters())
    assert "encoder.centres" in small().state_dict().keys() - trained.keys()


# ---- who sees whom

@torch.no_grad()
def answers(method, hidden=None):
    """[N,N] bool: does the output at m change with token n?"""
    tokens = torch.randint(7, (1, 16))
    hidden = torch.zeros(1, 16, dtype=torch.bool) if hidden is None else hidden
    before, rows = method.logits(tokens, hidden), []
    for n in range(16):
        other = tokens.clone()
        other[0, n] = (other[0, n] + 1) % 7
        rows.append(((method.logits(other, hidden) - before).abs().amax(2) > 1e-7)[0])
    return torch.stack(rows)


def test_ar_sees_exactly_the_tokens_before():
    places = torch.arange(16)
    assert torch.equal(answers(small().double()), places[:, None] < places)


def test_bert_sees_all_but_what_is_hidden():
    hidden = torch.rand(1, 16) < .3
    assert torch.equal(answers(small(causal=False).double(), hidden), ~hidden.T.expand(16, 16))
    assert 0 < hidden.sum() < 16 and answers(small(causal=False).double()).all()


def test_the_first_token_is_told_from_sos_alone():
    method = small()
    a, b = method.logits(torch.randint(7, (2, 16)), None)
    assert torch.allclose(a[0], b[0]) and not torch.allclose(a[1:], b[1:])
    assert not hasattr(small(causal=False).encoder, "sos")


# ---- a block by hand, and the layers

def test_block_by_hand():
    """RMS norms without a mean, attention of 2 heads, x sigmoid(1.702 x), no biases."""
    torch.manual_seed(0)
    block, x = igpt.Block(8, 2, 3, causal=True).double(), torch.randn(2, 5, 8, dtype=torch.double)
    nn.init.uniform_(block.norm1.weight)

    def norm(x, gain):
        return gain * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    q, k, v = (norm(x, block.norm1.weight) @ block.qkv.weight.T).chunk(3, 2)
    heads = []
    for a in (slice(0, 4), slice(4, 8)):
        s = (q[..., a] @ k[..., a].mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(s.softmax(-1) @ v[..., a])
    y = x + torch.cat(heads, 2) @ block.proj.weight.T
    u = norm(y, block.norm2.weight) @ block.fc1.weight.T
    y = y + (u / (1 + torch.exp(-1.702 * u))) @ block.fc2.weight.T
    assert torch.allclose(block(x), y)
    assert not any("bias" in name for name, _ in small().named_parameters())


def test_weights_before_training():
    torch.manual_seed(0)
    block = igpt.Block(256, 4, 9, causal=True)
    stds = [getattr(block, name).weight.std().item() for name in ("qkv", "proj", "fc1", "fc2")]
    assert stds == pytest.approx([1 / 16, 1 / 48, 1 / 16, 1 / 96], rel=.02)
    encoder = igpt.GPT(512, 16, 256, 1, 4, 1, True)
    assert [p.std().item() for p in (encoder.colour, encoder.position)] == pytest.approx([.02, .01], rel=.02)


def test_features_are_the_mean_of_the_named_layer_as_the_next_block_reads_it():
    method, x = small(), normalise(pixels(3, 3, 4, 4))
    encoder, read = method.encoder, []
    encoder.blocks[2].qkv.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    maps = encoder.layers(x)
    assert [tuple(a.shape) for a in maps] == 3 * [(3, 12, 4, 4)]
    assert torch.equal(maps[1].flatten(2).mT, read[0])
    assert torch.allclose(encoder(x), read[0].mean(1), atol=1e-6)
    method(x)
    assert torch.allclose(method.h, read[0].mean(1), atol=1e-6)
    last = torch.stack([maps[2][0, :, 1, 2], maps[2][2, :, 3, 0]])       # places 6 and 12
    logits = method.logits(encoder.tokens(x), None)
    assert torch.allclose(last @ method.head.weight.T, torch.stack([logits[0, 6], logits[2, 12]]), atol=1e-5)


# ---- the loss

@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_ln_k_before_training(objective):
    """6.238 for 512 colours, exactly: the output table starts at zero."""
    method = igpt.build(igpt.Config(objective=objective, k=512))
    method.encoder.centres.copy_(2 * torch.rand(512, 3) - 1)
    assert method(normalise(pixels(4, 3, 12, 12))).item() == pytest.approx(6.238324625, abs=1e-5)


def test_ar_loss_is_the_mean_of_minus_ln_p():
    method, x = small(), normalise(pixels(2, 3, 4, 4))
    tokens = method.encoder.tokens(x)
    p = method.logits(tokens, None).softmax(2)
    nats = [-math.log(p[b, n, tokens[b, n]].item()) for b in range(2) for n in range(16)]
    assert method(x).item() == pytest.approx(sum(nats) / 32, rel=1e-5)


def test_bert_pays_for_hidden_tokens_alone_image_by_image():
    method, x = small(causal=False, hide=.3), normalise(pixels(5, 3, 4, 4))
    tokens = method.encoder.tokens(x)
    torch.manual_seed(4)
    hidden = torch.rand(5, 16) < .3
    hidden_counts = hidden.sum(1)
    p = method.logits(tokens, hidden).softmax(2)
    each = [sum(-math.log(p[b, n, tokens[b, n]].item()) for n in hidden[b].nonzero()[:, 0].tolist())
            / hidden_counts[b].item() for b in range(5)]
    torch.manual_seed(4)
    assert len(hidden_counts.unique()) > 1 and hidden_counts.min() > 0
    assert method(x).item() == pytest.approx(sum(each) / 5, rel=1e-5)


def test_bert_hides_its_share_and_nothing_hidden_costs_nothing():
    method, x, seen = small(causal=False, size=8), normalise(pixels(100, 3, 8, 8)), []
    encode = method.encoder.encode
    method.encoder.encode = lambda tokens, hidden: seen.append(hidden) or encode(tokens, hidden)
    method(x)
    assert abs(seen[0].float().mean().item() - .15) < 5 * (.15 * .85 / 6400) ** .5
    method.hide = 1e-9
    assert method(x).item() == 0


def test_unknown_objective():
    with pytest.raises(SystemExit, match="--objective gan is unknown: give ar or bert"):
        igpt.build(igpt.Config(objective="gan"))


# ---- drawing

def test_what_is_drawn_has_the_likelihood_of_training(monkeypatch):
    method, tokens, used = small(), torch.randint(7, (4, 16)), []
    draw = torch.Tensor.multinomial
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda p, n: used.append(p) or draw(p, n))
    drawn = igpt.complete(method, tokens, 6)
    assert torch.equal(drawn[:, :6], tokens[:, :6]) and not torch.equal(drawn, tokens)
    p = method.logits(drawn, None).softmax(2)                    # [4,16,7], in one pass
    assert torch.allclose(torch.stack(used, 1), p[:, 6:], atol=1e-5)
    taught = nn.functional.cross_entropy(method.logits(drawn, None)[:, 6:].mT, drawn[:, 6:])
    by_draw = -torch.stack(used, 1).log().gather(2, drawn[:, 6:, None]).mean()
    assert by_draw.item() == pytest.approx(taught.item(), rel=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_to_be_drawn_is_not_looked_at(causal):
    method, tokens = small(causal), torch.randint(7, (4, 16))
    other, drawn = torch.cat([tokens[:, :6], torch.randint(7, (4, 10))], 1), []
    for start in (tokens, other):
        torch.manual_seed(1)
        drawn.append(igpt.complete(method, start, 6))
    assert torch.equal(*drawn) and not torch.equal(tokens, other)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_pictures_numbers_and_the_palette_of_the_seed(objective, tmp_path, monkeypatch):
    found, results = {}, []
    monkeypatch.setattr(igpt.common, "save_grid", lambda path, rows, note: found.update(rows))
    layers = {f"layer {i}": dict(linear=i, untrained=dict(linear=1.)) for i in range(1, 4)}

    def finish(run, **extra):
        results.append((run.method.encoder.centres.clone(), extra))
        return dict(layers=layers)
    monkeypatch.setattr(igpt.Run, "finish", finish)
    flags = "--data toys:n=100 --image_size 4 --width 8 --depth 2 --layer 1 --k 5 --steps 2 --batch_size 8"
    for seed in "001":
        argv = [*flags.split(), "--seed", seed, "--objective", objective, "--out", str(tmp_path)]
        igpt.main(igpt.parse(igpt.Config, igpt.PAPER, argv))
    (a, extra), (b, _), (c, _) = results
    assert torch.equal(a, b) and not torch.equal(a, c) and a.abs().max() <= 1
    assert extra["bits"] == pytest.approx(extra["nats"] / math.log(2) / 3) and 1 < extra["nats"] < 2
    assert list(found) == ["real", "in 5 colours", "completed, 1", "completed, 2"]
    assert torch.equal(found["completed, 1"][:, :, :2], found["in 5 colours"][:, :, :2])
    assert (tmp_path / "igpt-toys-n=100-seed0" / "layers.png").stat().st_size > 5000
