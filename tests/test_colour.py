"""Lab against the values that every colour table prints, and back again."""
import pytest
import torch

from kernels.colour import ab_bins, lab_to_rgb, rgb_to_lab

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


def test_autocast_changes_nothing():
    """16 bits would move a and b by units."""
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    lab = rgb_to_lab(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert rgb_to_lab(x).equal(lab)
        assert (lab_to_rgb(lab) - x).abs().max() < 2e-5


def test_colours_of_no_screen_are_clipped():
    x = lab_to_rgb(torch.tensor([50., 120, -120]).view(1, 3, 1, 1))
    assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1


def test_there_are_313_bins_about_their_known_mean():
    """Each once, ten apart, and (15.69, 6.68) in the mean; every colour of a screen is near one."""
    bins = ab_bins()
    assert bins.shape == (313, 2) and len(bins.unique(dim=0)) == 313 and not (bins % 10).any()
    assert torch.allclose(bins.mean(0), torch.tensor([15.69, 6.68]), atol=.005)
    cube = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 18)] * 3, indexing="ij")).view(1, 3, 18, -1)
    ab = rgb_to_lab(cube)[0, 1:].flatten(1).T
    nearest = torch.cdist(ab, bins).min(1)
    assert nearest.values.max() < 15 and len(nearest.indices.unique()) > 200
