"""Block-wise masks against what the official code was measured to do."""
import numpy as np
import pytest
import torch

from kernels.masks import block_mask


@pytest.mark.parametrize("side, budget, least, mean", [(14, 75, 16, 74.47), (8, 26, 4, 25.96)])
def test_blocks_have_the_size_that_the_official_algorithm_has(side, budget, least, mean):
    """The means are those of the official code, measured."""
    rng = np.random.default_rng(0)
    count = torch.stack([block_mask(side, budget, least, rng).sum() for _ in range(1500)]).double()
    assert count.max() <= budget and abs(count.mean() - mean) < 5 * count.std() / 1500 ** .5


def test_blocks():
    """Within the budget, a large one nearly spent; by one block or by more."""
    rng, spent, rectangles = np.random.default_rng(0), 0, []
    for budget in [18, 70] * 60:
        mask = block_mask(14, budget, 16, rng)
        y, x = np.nonzero(mask.numpy())
        assert mask.sum() <= budget
        if len(y):
            rectangles.append(mask[y.min():y.max() + 1, x.min():x.max() + 1].all().item())
        spent += mask.sum().item() * (budget == 70)
    assert spent / 60 > 65 and .1 < np.mean(rectangles) < .5
