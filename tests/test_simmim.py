"""SimMIM: its squares, what the encoder sees, what it pays for."""
import math

import pytest
import torch
from running import load, train
from torch import nn

simmim = load("simmim")


def made():
    torch.manual_seed(0)
    return simmim.build(simmim.Config()).eval()


def test_squares_hide_the_share_rounded_up():
    """Of 32 px, in squares of 8 px and patches of 4: 10 of 16 squares, 40 of 64 patches; of 224 px, 30 of 49
    squares of 32, 120 of 196 patches of 16: the fact sheet's numbers."""
    torch.manual_seed(0)
    for side, hidden in ((8, 40), (14, 120)):
        mask = simmim.random_squares(500, side, 2, .6, "cpu")
        assert mask.shape == (500, side ** 2) and (mask.sum(1) == hidden).all()
        squares = mask.view(500, side // 2, 2, side // 2, 2)
        assert torch.equal(squares.all(4).all(2), squares.any(4).any(2))         # whole ones
        share = mask.float().mean(0)                             # no place is favoured
        assert (share - hidden / side ** 2).abs().max() < 5 * (.24 / 500) ** .5
    assert simmim.random_squares(3, 8, 4, .5, "cpu").sum(1).tolist() == [32] * 3


def test_pays_the_mean_absolute_error_of_hidden_pixels_only():
    method, x = made(), torch.randn(4, 3, 32, 32)
    torch.manual_seed(3)
    prediction, mask = method.reconstruct(x)
    torch.manual_seed(3)
    loss = method(x)
    picture = simmim.unpatchify(prediction, 4, 32)
    pixels = mask.view(4, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(4, 3, 32, 32)
    by_hand = ((picture - x).abs() * pixels).sum() / pixels[:, 0].sum() / 3      # as the official code has it
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_predicting_zero_costs_what_a_normal_variable_has():
    method = made()
    nn.init.zeros_(method.head.weight)
    nn.init.zeros_(method.head.bias)
    expected, n = math.sqrt(2 / math.pi), 64 * 3 * 640           # E|x|, hidden values
    assert method(torch.randn(64, 3, 32, 32)).item() == pytest.approx(expected, abs=5 * .6 / n ** .5)


def test_the_encoder_sees_places_but_not_pixels_of_the_hidden():
    method, x = made(), torch.randn(4, 3, 32, 32)
    torch.manual_seed(3)
    prediction, mask = method.reconstruct(x)
    patches = simmim.patchify(x, 4)
    for where, same in ((mask, True), (~mask, False)):
        other = torch.where(where[..., None], torch.randn_like(patches), patches)
        torch.manual_seed(3)
        again, _ = method.reconstruct(simmim.unpatchify(other, 4, 32))
        assert torch.allclose(again, prediction, atol=1e-5) == same
    hidden = prediction[0][mask[0]]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3            # the mask tokens have positions


def test_squares_must_fit():
    for square in (6, 12):
        with pytest.raises(SystemExit, match=f"--square {square}: give a multiple of 4, a part of 32"):
            simmim.build(simmim.Config(square=square))


def test_picture_and_reference(tmp_path, monkeypatch):
    found, start = {}, simmim.Run.start
    def spy(self, method, data, reference, *optimizers):
        found.update(reference=reference, data=data)
        return start(self, method, data, reference, *optimizers)
    monkeypatch.setattr(simmim.Run, "start", spy)
    monkeypatch.setattr(simmim.common, "save_grid", lambda path, rows: found.update(rows))
    train("simmim", tmp_path, monkeypatch, "--steps", "1", images=16)
    x = simmim.normalise(found["data"].images)
    deviation = (x - x.mean((0, 2, 3), keepdim=True)).abs().mean().item()
    assert found["reference"] == {"mean colour": pytest.approx(deviation)}
    seen, painted, x = (found[name] for name in ("seen", "painted", "x"))
    assert torch.allclose(x, found["data"].test_images[:10] / 255, atol=1e-5)
    same = (painted == x).all(1).view(10, 8, 4, 8, 4).all(4).all(2)      # patches that stand
    assert (same.sum((1, 2)) == 24).all()
    assert torch.equal((seen == x).all(1).view(10, 8, 4, 8, 4).all(4).all(2), same)
