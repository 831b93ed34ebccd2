"""PixelCNN: its masks, who sees whom, bits per dimension, its baselines, and what is drawn."""
import math

import pytest
import torch
from running import load
from torch import nn

from kernels.views import normalise

pixelcnn = load("pixelcnn")


def small(width=6, depth=3, layer=2):
    torch.manual_seed(0)
    return pixelcnn.PixelCNN(pixelcnn.GatedStack(width, depth, layer))


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def logits(method, x):                                           # uint8 [B,3,H,W] -> [B,256,3,H,W]
    return method.logits(method.encoder.layers(normalise(x))[-1])


# ---- who sees whom

def test_masks_by_hand():
    """Rows: the colour that looks, r g b r g b; columns: the colour seen. Pixels to the left are all seen."""
    a, b = (pixelcnn.RowConv(3, 6, 2, kind).mask[:, :, 0] for kind in "AB")
    assert (a[..., 0] == 1).all() and (b[..., 0] == 1).all()
    assert a[..., 1].tolist() == 2 * [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert b[..., 1].tolist() == 2 * [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_value_sees_all_before_it_and_nothing_else():
    """Each of the 5 x 5 x 3 values is changed in turn: exactly those after it, in reading order, answer.
    No blind spot: the top right corner is seen by all rows below, up to the left edge."""
    method, x = small(width=48), pixels(1, 3, 5, 5)           # many: a ReLU may be dead
    with torch.no_grad():
        method, x = method.double(), normalise(x).double()
        before = method.encoder.layers(x)[-1]
        for n in range(75):
            i, j, c = n // 15, n // 3 % 5, n % 3
            other = x.clone()
            other[0, c, i, j] += 3
            h = method.encoder.layers(other)[-1]
            out = (method.logits(h) != method.logits(before))[0].any(0)          # [3,5,5]
            assert out.permute(1, 2, 0).flatten().tolist() == [m > n for m in range(75)], (i, j, c)


def test_only_the_first_layer_hides_the_value_itself():
    method = small()
    kinds = [block.horizontal.mask.sum((2, 3))[:3, :3].diagonal().tolist() for block in method.encoder.blocks]
    assert kinds == [[3, 3, 3], [2, 2, 2], [2, 2, 2]]            # 3 of 4 columns, then 2 of 2
    assert [tuple(block.vertical.kernel_size) for block in method.encoder.blocks] == [(4, 7), (2, 3), (2, 3)]


def test_what_is_masked_has_no_gradient_and_is_left_alone():
    method = small()
    weights = {name: p.detach().clone() for name, p in method.named_parameters()}
    method(normalise(pixels(4, 3, 6, 6))).backward()
    convs = [m for m in method.modules() if isinstance(m, pixelcnn.RowConv)]
    assert len(convs) == 3 * 2 + 2
    for conv in convs:
        assert (conv.weight.grad[conv.mask.expand_as(conv.weight) == 0] == 0).all()
    assert all(torch.equal(p, weights[name]) for name, p in method.named_parameters())


# ---- a layer by hand

def test_gate_and_residual():
    x = torch.randn(2, 8, 3, 3)
    assert torch.allclose(pixelcnn.gate(x), torch.tanh(x[:, :4]) / (1 + torch.exp(-x[:, 4:])), atol=1e-6)
    for kind, kept in (("B", 1.), ("A", 0.)):
        layer, v, h = pixelcnn.GatedLayer(6, 6, 3, kind), *torch.randn(2, 1, 6, 4, 4)
        nn.init.zeros_(layer.out.weight)
        nn.init.zeros_(layer.out.bias)
        assert torch.equal(layer(v, h)[1], kept * h)


def test_features_are_the_mean_of_the_named_layer():
    method, x = small(layer=2), torch.randn(4, 3, 6, 6)
    maps = method.encoder.layers(x)
    assert [tuple(a.shape) for a in maps] == 3 * [(4, 12, 6, 6)]
    assert torch.equal(method.encoder(x), maps[1].mean((2, 3)))
    method(x)
    assert torch.equal(method.h, maps[1].mean((2, 3)))


# ---- bits

def test_targets_are_the_bytes_of_the_image(monkeypatch):
    x, seen = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16), []
    monkeypatch.setattr(pixelcnn.F, "cross_entropy", lambda out, x: seen.append(x) or out.mean())
    small()(normalise(x))
    assert torch.equal(seen[0], x.long())


def test_says_nothing_before_training():
    """8 bits exactly where the logits are 0, and nearly as it is drawn."""
    x, method = normalise(pixels(8, 3, 16, 16)), pixelcnn.build(pixelcnn.Config())
    assert 7.99 < method(x).item() < 8.1
    nn.init.zeros_(method.head[-1].weight)
    nn.init.zeros_(method.head[-1].bias)
    assert method(x).item() == pytest.approx(8, abs=1e-5)


def test_loss_is_the_mean_of_minus_log2_p_of_each_value():
    method, x = small(), pixels(2, 3, 4, 4)
    p = logits(method, x).softmax(1)
    bits = [-math.log2(p[b, x[b, c, i, j].item(), c, i, j].item()) for b in range(2) for c in range(3)
            for i in range(4) for j in range(4)]
    assert method(normalise(x)).item() == pytest.approx(sum(bits) / len(bits), rel=1e-5)


# ---- drawing

def test_what_is_drawn_has_the_likelihood_of_training(monkeypatch):
    """The probabilities with which values were drawn are those that the whole image gets in one pass."""
    method, x, used = small().eval(), pixels(3, 3, 4, 4), []
    draw = torch.Tensor.multinomial
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda p, n: used.append(p) or draw(p, n))
    nn.init.normal_(method.head[-1].weight, std=30.)             # far from uniform
    drawn = pixelcnn.draw_rows(method, x, first=1)
    assert torch.equal(drawn[:, :, 0], x[:, :, 0]) and not torch.equal(drawn[:, :, 1:], x[:, :, 1:])
    p = logits(method, drawn)[:, :, :, 1:].softmax(1)            # [3,256,3,3,4]
    used = torch.stack(used).view(3, 4, 3, 3, 256)               # row, column, colour, image
    assert torch.allclose(used, p.permute(3, 4, 2, 0, 1), atol=1e-5) and p.amax() > .2
    by_draw = -used.log2().gather(4, drawn[:, :, 1:].long().permute(2, 3, 1, 0)[..., None]).mean()
    taught = -p.log2().gather(1, drawn[:, None, :, 1:].long()).mean()
    assert by_draw.item() == pytest.approx(taught.item(), rel=1e-4)


def test_what_is_hidden_is_not_looked_at():
    method, x = small().eval(), pixels(2, 3, 4, 4)
    other = torch.cat([x[:, :, :2], pixels(2, 3, 2, 4)], 2)
    torch.manual_seed(1)
    a = pixelcnn.draw_rows(method, x, 2)
    torch.manual_seed(1)
    assert torch.equal(a, pixelcnn.draw_rows(method, other, 2)) and not torch.equal(x, other)


def test_pictures_and_numbers(tmp_path, monkeypatch):
    found, result = {}, {}
    monkeypatch.setattr(pixelcnn.common, "save_grid", lambda path, rows: found.update({path.name: rows}))
    monkeypatch.setattr(pixelcnn, "draw_rows", lambda method, x, first=0: x + 1 if first else x)
    monkeypatch.setattr(pixelcnn.Run, "finish", lambda self, **extra: result.update(extra))
    flags = "--data toys:n=100 --width 6 --image_size 8 --steps 1 --out".split()
    pixelcnn.main(pixelcnn.parse(pixelcnn.Config, pixelcnn.PAPER, [*flags, str(tmp_path)]))
    rows = found["samples.png"]
    assert torch.equal(rows["upper half"][:, :, :4], rows["real"][:, :, :4])
    assert (rows["upper half"][:, :, 4:] == 128).all() and torch.equal(rows["completed"], rows["real"] + 1)
    assert 7.9 < result["bits"] < 8.1 and 7.9 < result["bits_histogram"] < 8.1
