"""Loads a method's file, and runs its own main() on one batch; an encoder whose features are known."""
import contextlib
import importlib
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

import common
import kernels.slots
from kernels.attention import attention
from kernels.slot_attention import slot_attention

ROOT = Path(__file__).parents[1]
METHODS = sorted(f.stem for f in (ROOT / "methods").glob("*.py"))
UNTAUGHT = dict(dinosaur=["--no-pretrain", "--image_size", "16"],          # without another's encoder
                spot=["--no-pretrain", "--image_size", "16", "--teacher", "0"])
sys.path.insert(0, str(ROOT / "methods"))


def load(name):
    """With plain attention, not in Triton's interpreter: the kernels have tests of their own."""
    module = importlib.import_module(name)
    kernels.slots.slot_attention = partial(slot_attention, impl="reference")
    if hasattr(module, "attention"):
        module.attention = partial(attention, impl="reference")
    return module


@contextlib.contextmanager
def as_on_a_laptop():
    """On a CPU the kernels' operators run their formulas in PyTorch, not in Triton's interpreter."""
    modules = [module for name, module in sys.modules.items() if name.startswith("kernels.")]
    with contextlib.ExitStack() as stack:
        for op in (op for module in modules for op in vars(module).values()):
            if isinstance(op, torch.library.CustomOpDef) and "cpu" in op._backend_fns:
                stack.enter_context(op.set_kernel_enabled("cpu", False))
        yield


def train(name, tmp_path, monkeypatch, *flags, images=64, stop=0):
    """Runs a method's own main() on one batch, without the evaluation. -> the method, its losses, its log;
    its "finished" is what the method itself measured. stop: after so many steps the run is saved and over."""
    losses, seen, module, steps = [], [], load(name), common.Run.steps

    def some(self, n):
        for i, item in enumerate(steps(self, n), 1):
            yield item
            if i == stop:
                self.save()
                return

    def finite(self, loss):
        assert self.method.training
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(common.Run, "finish", lambda self, **extra: seen.append((self, extra)) or {})
    monkeypatch.setattr(common, "probe", lambda *args: dict(knn=0., linear=0.))
    monkeypatch.setattr(common.Run, "finite", finite)
    world = module.Config.data or "toys"
    data = world + (":" if world == "toys" else ",") + f"n={images}"
    argv = ["--data", data, "--batch_size", str(images), "--out", str(tmp_path), *flags]
    with as_on_a_laptop(), monkeypatch.context() as patch:
        patch.setattr(common.Run, "steps", some)
        module.main(common.parse(module.Config, module.PAPER, argv))
    (run, finished), = seen
    return run.method, losses, run.last | dict(finished=finished)


def given(module, monkeypatch):
    """What the method is called with, step by step: filled while it trains."""
    seen, build = [], module.build

    def hooked(cfg):
        method = build(cfg)
        method.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        return method

    monkeypatch.setattr(module, "build", hooked)
    return seen


class Lookup(nn.Module):
    """An encoder that returns what stands in the image's first pixels."""
    def __init__(self, dim):
        super().__init__()
        self.dim, self.p = dim, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x.flatten(1)[:, :self.dim] + self.p
