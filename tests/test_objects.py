"""Slot Attention: its loss by hand, what its decoder is given."""
import pytest
import torch
from running import load

SMALL = dict(image_size=16, k=3, dim=8)


def small(name, **options):
    module = load(name)
    torch.manual_seed(0)
    return module, module.build(module.Config(**SMALL, **options))


def x(n=4, seed=1):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


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


def test_slot_attention_counts_positions_from_the_centre_of_attention():
    """relative: the decoder is given the mean place of what the slot attends to; else the middle."""
    for relative in (True, False):
        _, method = small("slot_attention", relative=relative)
        seen, decoder = [], method.decoder.forward
        method.decoder.forward = lambda s, c, seen=seen, decoder=decoder: seen.append(c) or decoder(s, c)
        _, _, a = method.parts(x())
        a = a[-1][1, 2]                                          # image 1, slot 2: [N]
        at = load("slot_attention").axes(8)
        want = (a[:, None] * at).sum(0) / a.sum() if relative else torch.zeros(2)
        assert torch.allclose(seen[0][1, 2], want, atol=1e-4)

