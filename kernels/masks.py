"""Block-wise masks: patches hidden in rectangles, as BEiT and iBOT hide them.

Bao, Dong, Piao, Wei. BEiT: BERT Pre-Training of Image Transformers. ICLR 2022, arXiv 2106.08254, Algorithm 1,
as the official code has it.
"""
import numpy as np
import torch


def block_mask(side: int, budget: float, least: int, rng: np.random.Generator, aspect: float = .3):
    """bool [side,side], True = hidden: blocks of random aspect and area, of `least` patches or more where the
    budget, a number of patches, allows it, each within what is left, until ten tries in a row do not fit."""
    mask = np.zeros((side, side), bool)
    while (room := budget - mask.sum()) > 0:
        for _ in range(10):
            area, a = least + rng.random() * (room - least), aspect ** rng.uniform(-1, 1)
            h, w = round((area * a) ** .5), round((area / a) ** .5)
            if h < side and w < side:
                y, x = rng.integers(side - h + 1), rng.integers(side - w + 1)
                if 0 < h * w - mask[y:y + h, x:x + w].sum() <= room:
                    mask[y:y + h, x:x + w] = True
                    break
        else:
            break
    return torch.from_numpy(mask)
