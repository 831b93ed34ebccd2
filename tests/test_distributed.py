"""Two processes have the gradients and statistics of one with the whole batch; planted mistakes are seen."""
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import two_processes
from torch import nn

import common
from kernels.encoders import create_encoder
from methods.barlow_twins import BarlowTwins
from methods.bownet import BoWNet
from methods.byol import BYOL
from methods.dino import DINO
from methods.exemplar_cnn import ExemplarCNN
from methods.ibot import IBOT
from methods.instdisc import InstDisc
from methods.moco import MoCo
from methods.obow import OBoW
from methods.simclr import SimCLR
from methods.simsiam import SimSiam
from methods.swav import SwAV
from methods.vicreg import VICReg

ROOT = Path(__file__).parents[1]
CLOSE = dict(rtol=1e-9, atol=1e-11)                         # float64
NOT_COMPARED = "num_batches|generator.1.running_var"        # the same K words on both count as 2K


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(seed):
    """Eight images, no two of the same brightness, so that the halves differ."""
    i = torch.arange(8.).view(8, 1, 1, 1)
    return rand(8, 3, 8, 8, seed=seed) * (.5 + i / 4) + i


def simclr(gather=common.gather):
    torch.manual_seed(0)
    return SimCLR(create_encoder("resnet_small", 8), hidden=16, dim=8, gather=gather).double()


def byol():
    torch.manual_seed(0)
    method = BYOL(create_encoder("resnet_small", 8), hidden=16, dim=8).double()
    for p in method.teacher.parameters():                   # not equal to the student
        p.mul_(1.1)
    return method


def simsiam():
    torch.manual_seed(0)
    return SimSiam(create_encoder("resnet_small", 8), dim=16, bottleneck=8).double()


def barlow_twins():
    torch.manual_seed(0)
    return BarlowTwins(create_encoder("resnet_small", 8), hidden=16, dim=8, gather=common.gather).double()


def vicreg():
    torch.manual_seed(0)
    return VICReg(create_encoder("resnet_small", 8), hidden=16, dim=8, gather=common.gather).double()


def instdisc():
    torch.manual_seed(0)
    return InstDisc(create_encoder("resnet_small", 8), n=20, dim=8, gather=common.gather).double()


def moco(version=2):
    torch.manual_seed(0)
    method = MoCo(create_encoder("resnet_small", 8), version, hidden=16, dim=8, queue=12, splits=2,
                  shuffle=False, gather=common.gather).double()
    for p in method.teacher.parameters():                   # not equal to the student
        p.mul_(1.1)
    return method


def moco_v3():
    return moco(3)


def swav():
    """With small views and a full queue; enqueue() is part of it, its order is that of the processes."""
    def forward(v1, v2):
        loss = SwAV.forward(method, v1, v2, v2[..., 4:, 4:], v1[..., :4, :4])
        method.enqueue()
        method.queue.copy_(method.queue.sort(1).values)
        return loss
    torch.manual_seed(0)
    method = SwAV(create_encoder("resnet_small", 8), hidden=16, dim=8, prototypes=5, queue=12,
                  gather=common.gather).double()
    method.queue.copy_(nn.functional.normalize(rand(2, 12, 8), dim=2))
    method.normalise_prototypes()
    method.forward = forward
    return method


def dino():
    """With a small crop; the teacher's move, and the centre's, come after the step."""
    def forward(v1, v2):
        return DINO.forward(method, v1, v2, v2[..., 4:, 4:])
    torch.manual_seed(0)
    method = DINO(create_encoder("resnet_small", 8), hidden=16, dim=8, k=5, gather=common.gather).double()
    for p in method.head.parameters():                      # not equal to the student
        p.mul_(1.1)
    method.forward, method.after = forward, lambda: method.update_teacher(.9)
    return method


def ibot():
    """What is hidden depends on the image alone, other numbers of patches of each; then as dino()."""
    def forward(v1, v2):
        known = dict(draw_masks=lambda kind, a: a > a.mean(1, keepdim=True))
        with mock.patch.dict(IBOT.forward.__globals__, known):
            return IBOT.forward(method, v1, v2, v2[..., 4:, 4:])
    torch.manual_seed(0)
    method = IBOT(create_encoder("vit_micro/2", 8), hidden=16, dim=8, k=5, gather=common.gather).double()
    for p in method.head.parameters():                      # not equal to the student
        p.mul_(1.1)
    method.forward, method.after = forward, lambda: method.update_teacher(.9)
    return method


def bownet():
    torch.manual_seed(0)
    method = BoWNet(create_encoder("resnet_small", 8), 64, k=6).double()
    method.words.copy_(rand(6, 64).abs())
    return method


def obow():
    """Its maps have one place; enqueue() is part of it, its order is that of the processes."""
    def forward(v1, v2):
        loss = OBoW.forward(method, v1, v2)
        method.enqueue()
        for level in method.levels:
            level.words.copy_(level.words.sort(0).values)
        return loss
    torch.manual_seed(0)
    method = OBoW(create_encoder("resnet_small", 8), (64, 128), k=12, gather=common.gather).double()
    method.forward = forward
    return method


def exemplar_cnn():
    """The triplets of a batch, of all processes; distances in float64, too."""
    def forward(v1, v2):
        k = v1.mean((1, 2, 3)).argsort().argsort() + 4 * common.rank()      # of each seed another number
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            return ExemplarCNN.forward(method, torch.cat([v1, v2]), torch.cat([k, k]))
    torch.manual_seed(0)
    method = ExemplarCNN(create_encoder("resnet_small", 8), "triplet", dim=8, dropout=0.,
                         gather=common.gather).double()
    method.forward = forward
    return method


METHODS = dict(exemplar_cnn=exemplar_cnn, simclr=simclr, byol=byol, simsiam=simsiam,
               barlow_twins=barlow_twins, vicreg=vicreg, instdisc=instdisc, moco=moco, moco_v3=moco_v3,
               swav=swav, dino=dino, ibot=ibot, bownet=bownet, obow=obow)


def norms():
    """BatchNorm of rows and of maps, and one without weights."""
    torch.manual_seed(0)
    method = nn.Module()
    method.rows, method.maps = nn.BatchNorm1d(3), nn.BatchNorm2d(3)
    method.bare = nn.BatchNorm1d(3, affine=False)
    nn.init.normal_(method.maps.weight)
    nn.init.normal_(method.maps.bias)
    return method.double()


def detached(z):
    """The mistake of a plain all_gather: the rows of the others are constants."""
    rows = [torch.empty_like(z) for _ in range(common.world())]
    dist.all_gather(rows, z.detach().contiguous())
    rows[common.rank()] = z
    return torch.cat(rows)


def swapped(z):
    """The mistake of rows in another order on each process, so that views do not pair."""
    rows = common.gather(z).chunk(common.world())
    return torch.cat(rows[::-1]) if next(swapped.calls) % 2 else torch.cat(rows)


def step(method, share):
    """Loss, gradients and buffers of one step on this share of the batch."""
    model, inputs = common.distribute(method), [images(seed)[share] for seed in (1, 2)]
    if isinstance(method, InstDisc):
        inputs[1] = torch.tensor([3, 19, 0, 7, 8, 4, 11, 12])[share]        # which images these are
    loss = model(*inputs)
    loss.backward()
    if isinstance(method, InstDisc):
        method.update_memory(inputs[1])
    if isinstance(method, (DINO, IBOT)):
        method.after()
    grads = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    return dict(loss=loss.detach(), grads=grads, buffers=dict(method.named_buffers()))


def norm_step(method, share):
    """Outputs, gradients and buffers of BatchNorm alone, in training and in evaluation."""
    common.distribute(method)
    x = images(3)[share].requires_grad_()
    y = [method.maps(x), method.rows(x.mean((2, 3))), method.bare(x.mean((2, 3)))]
    sum((v ** 3 * torch.arange(3).view(-1, *[1] * (v.ndim - 2))).sum() for v in y).backward()
    method.eval()
    return dict(y=[v.detach() for v in y], x=x.grad, evaluated=method.maps(x).detach(),
                weight=method.maps.weight.grad, bias=method.maps.bias.grad,
                buffers=dict(method.named_buffers()))


def together(z):
    """A function of all rows in which no two play the same part."""
    return (z.cumsum(0).sin() * torch.arange(1., z.numel() + 1, dtype=z.dtype).view_as(z)).sum()


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    share, swapped.calls = slice(rank, None, 2), iter(range(9))             # as Run.steps() deals the images
    z = rand(3, 2, seed=7 + rank).requires_grad_()
    rows = common.gather(z)
    together(rows).backward()
    out = dict(gather=dict(rows=rows.detach(), grad=z.grad), norms=norm_step(norms(), share),
               **{name: step(method(), share) for name, method in METHODS.items()},
               detached=step(simclr(detached), share), swapped=step(simclr(swapped), share))
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    return two_processes(worker, tmp_path_factory.mktemp("gloo"))


def close(a, b):
    """Every gradient or buffer, by name."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_gather_has_all_rows_in_order_and_their_gradient(both):
    """Backward sums the copies of the loss: twice the gradient of one process."""
    z = torch.cat([rand(3, 2, seed=7), rand(3, 2, seed=8)]).requires_grad_()
    together(z).backward()
    for rank, found in enumerate(both):
        assert found["gather"]["rows"].equal(z.detach())
        torch.testing.assert_close(found["gather"]["grad"], 2 * z.grad[3 * rank:3 * rank + 3], **CLOSE)
    assert common.gather(z) is z                            # on one process


def test_batch_norm_has_the_statistics_of_the_whole_batch(both):
    """Outputs, gradients, running statistics and evaluation beside torch's own on one process."""
    whole = norm_step(norms(), slice(None))
    for rank, found in enumerate(f["norms"] for f in both):
        for a, b in zip(found["y"], whole["y"], strict=True):
            torch.testing.assert_close(a, b[rank::2], **CLOSE)
        torch.testing.assert_close(found["x"], whole["x"][rank::2], **CLOSE)
        torch.testing.assert_close(found["evaluated"], whole["evaluated"][rank::2], **CLOSE)
        close({k: v for k, v in found["buffers"].items() if "num_batches" not in k},
              {k: v for k, v in whole["buffers"].items() if "num_batches" not in k})
    for name in ("weight", "bias"):                         # of this process's rows; DDP takes the mean
        torch.testing.assert_close(both[0]["norms"][name] + both[1]["norms"][name], whole[name], **CLOSE)


def test_batch_norm_counts_its_batches(both):
    """The counter is in every state_dict, so it should not depend on the number of processes."""
    counts = {k: int(v) for k, v in both[0]["norms"]["buffers"].items() if "num_batches" in k}
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_gradient_of_one(name, both):
    whole = step(METHODS[name](), slice(None))
    assert sum(g.abs().max() > 1e-6 for g in whole["grads"].values()) > 10  # there is something to compare
    for found in (f[name] for f in both):
        close(found["grads"], whole["grads"])
        close(*({k: v for k, v in one["buffers"].items() if not re.search(NOT_COMPARED, k)}
                for one in (found, whole)))
    losses = torch.stack([f[name]["loss"] for f in both])
    torch.testing.assert_close(losses.mean(), whole["loss"], **CLOSE)
    if name in ("exemplar_cnn", "simclr", "barlow_twins", "vicreg", "moco_v3", "swav"):
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-14, atol=0)    # of all rows, on both


@pytest.mark.parametrize("mistake", ["detached", "swapped"])
def test_a_wrong_gather_would_be_noticed(mistake, both):
    whole = step(simclr(), slice(None))["grads"]
    name = "encoder.conv1.weight"
    assert (both[0][mistake]["grads"][name] - whole[name]).norm() > .1 * whole[name].norm()


def test_one_process_is_left_as_it_is():
    method = simclr()
    kinds = [type(m) for m in method.modules()]
    assert common.distribute(method) is method and [type(m) for m in method.modules()] == kinds


def test_batch_size_must_be_a_multiple(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "world", lambda: 3)
    with pytest.raises(SystemExit, match="--batch_size 128 must be a multiple of the 3 processes"):
        common.Run(common.Config(out=str(tmp_path), device="cpu"), __file__)


def test_batchnorm_of_bf16_has_its_statistics_in_fp32(tmp_path):
    """Alone in its group it is BatchNorm; before, autocast's bf16 was refused."""
    one, x = nn.BatchNorm1d(5), (3 + torch.randn(64, 5)).bfloat16()
    other = copy.deepcopy(one)
    other.__class__ = common.SyncBatchNorm
    dist.init_process_group("gloo", f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        y = other(x)
        low = nn.BatchNorm1d(5).bfloat16()
        low.__class__ = common.SyncBatchNorm
        assert low(x).dtype == low.running_mean.dtype == torch.bfloat16 and low.running_mean.min() > .2
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(y, one(x.float()).bfloat16(), rtol=.01, atol=.01)
    torch.testing.assert_close(other.running_var, one.running_var)
    assert y.dtype == torch.bfloat16


def test_torchrun_from_end_to_end(tmp_path):
    """One folder, one table, one log; the weights that are kept are those of plain BatchNorm."""
    flags = "--data toys:n=300 --image_size 16 --batch_size 32 --steps 4 --device cpu --out".split()
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               ROOT / "methods" / "simclr.py", *flags, tmp_path / "runs"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 4 and "simclr on 2 x cpu" in done.stdout
    assert done.stdout.count("untrained encoder") == 1 and "Traceback" not in done.stderr
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and all(line["loss"] > 0 for line in lines)
    encoder = create_encoder("resnet_small", 16)
    untrained = copy.deepcopy(encoder.state_dict())
    encoder.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True))
    assert not encoder.state_dict()["bn1.running_mean"].equal(untrained["bn1.running_mean"])
