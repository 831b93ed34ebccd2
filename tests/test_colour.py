"""Lab against the values that every colour table prints, and back again."""
import pytest
import torch

from kernels.colour import lab_to_rgb, rgb_to_lab

KNOWN = [((1, 1, 1), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((1, 0, 0), (53.24, 80.09, 67.20)),
         ((0, 1, 0), (87.73, -86.18, 83.18)), ((0, 0, 1), (32.30, 79.19, -107.86)),
         ((1, 1, 0), (97.14, -21.55, 94.48)), ((.5, .5, .5), (53.39, 0, 0))]


@pytest.mark.parametrize("rgb, lab", KNOWN)
def test_known_colours(rgb, lab):
    x = torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)
    assert torch.allclose(rgb_to_lab(x).flatten(), torch.tensor(lab, dtype=torch.float64), atol=.01)


def test_there_and_back():
    x = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lab_to_rgb(rgb_to_lab(x)), x, atol=2e-5)
    grey = torch.linspace(0, 1, 256).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    assert rgb_to_lab(grey)[:, 1:].abs().max() < 1e-4            # no grey has a colour
    assert (rgb_to_lab(grey)[:, 0, 0, 0].diff() > 0).all()


def test_colours_of_no_screen_are_clipped():
    x = lab_to_rgb(torch.tensor([50., 120, -120]).view(1, 3, 1, 1))
    assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1
