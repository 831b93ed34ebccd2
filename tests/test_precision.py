"""TF32 may be allowed by PyTorch's newer switch as well, after which its older one cannot be asked."""
import pytest
import torch
from harness import DEVICE

from kernels.attention import attention
from kernels.clip import clip_loss
from kernels.contrastive import nt_xent
from kernels.cross_correlation import barlow_twins_loss
from kernels.info_nce import info_nce
from kernels.prototype_features import prototype_ce_features
from kernels.slot_attention import slot_attention

CALLS = dict(
    attention=lambda x: attention(*3 * [x[None, None]], impl="triton"),
    clip=lambda x: clip_loss(x, x, torch.ones((), device=DEVICE), impl="triton"),
    contrastive=lambda x: nt_xent(x, .5, impl="triton"),
    cross_correlation=lambda x: barlow_twins_loss(x, x.flip(0), .01, impl="triton"),
    info_nce=lambda x: info_nce(x, x, torch.arange(16, device=DEVICE), .5, impl="triton"),
    prototype_features=lambda x: prototype_ce_features(x, x, x, x, .1, .1, impl="triton"),
    slot_attention=lambda x: slot_attention(x[None, :4], x[None], x[None], impl="triton"))


@pytest.mark.parametrize("name", CALLS)
def test_tf32_by_the_newer_switch(name, monkeypatch):
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    before = CALLS[name](x)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    torch.testing.assert_close(CALLS[name](x), before, rtol=.02, atol=.02)       # TF32 has ten bits
