"""On a machine with no GPU, every kernel compiles for seven: it fits, spills nothing, uses the tensor cores.

LAUNCHES has, for each kernel file, the calls of one training step at sizes that people use. A child process
makes them with the launch replaced by a recorder, so that signatures, tiles and options are the file's own.
"""
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = {                                                   # backend, arch, warp, shared memory, MMA
    "sm_80": ("cuda", 80, 32, 166_912, "mma.sync"),
    "sm_86": ("cuda", 86, 32, 101_376, "mma.sync"),            # RTX 30, and so 40
    "sm_90": ("cuda", 90, 32, 232_448, "wgmma.mma_async"),
    "sm_100": ("cuda", 100, 32, 232_448, "tcgen05.mma"),
    "sm_120": ("cuda", 120, 32, 101_376, "mma.sync"),          # RTX 50
    "gfx90a": ("hip", "gfx90a", 64, 65_536, "v_mfma"),
    "gfx942": ("hip", "gfx942", 64, 65_536, "v_mfma"),
}
TYPES = ["bf16", "fp32", "tf32"]
SPILLS = {("attention", "tf32", "sm_86"): 16, ("slot_attention", "bf16", "sm_86"): 96,       # bytes a thread
          ("slot_attention", "bf16", "sm_120"): 16}


def contrastive(k, new):                                          # k: the module; new(*shape): a tensor
    for n, D in (1024, 128), (32768, 128), (1024, 512), (32768, 512):
        z, lse, go = new(n, D), new(2, n, acc=True), new(acc=True)
        k._forward_triton(z, .1)
        k._backward_triton(go, z, lse, .1)


def prototype_ce(k, new):
    s, t, center = new(640, 65536), new(640, 65536), new(65536, acc=True)
    lse, go = new(4, 640, acc=True), new(640, acc=True)
    for c, tau_t in (center, .04), (None, 0.):                    # 0: the teacher is codes
        k._forward_triton(s, t, c, .1, tau_t)
        k._backward_triton(go, s, t, c, lse, .1, tau_t)


def prototype_features(k, new):
    x, w, center = new(8192, 256), new(65536, 256), new(65536, acc=True)
    lse, go = new(4, 8192, acc=True), new(8192, acc=True)
    k._forward_triton(x, w, x, w, center, .1, .04)
    for of_w in False, True:
        k._backward_triton(go, x, w, x, w, center, lse, .1, .04, of_w)


def cross_correlation(k, new):
    for D in 1024, 2048:
        k._forward_triton(new(4096, D), new(4096, D), 4096, 1., .005)


def clip(k, new):
    a, scale, lse = new(4096, 512), new(acc=True), new(2, 8192, acc=True)
    k._forward_triton(a, a, scale)
    k._backward_triton(a, a, scale, lse, False)


def info_nce(k, new):
    for B, M, D, kind, swap in (256, 65536, 128, "float", False), (4096, 32768, 512, "int", True):
        q, keys, target, lse = new(B, D), new(M, D), getattr(new(B, acc=True), kind)(), new(2, B, acc=True)
        k._forward_triton(q, keys, target, .1)
        k._backward_triton(*((keys, q) if swap else (q, keys)), target, lse, .1, swap)


def attention(k, new):
    rows = new(1).long() * 0
    for q, pad, R in (new(2, 6, 197, 64), True, 1), (new(2, 16, 257, 80), False, 0):     # ViT-S, ViT-H
        (B, H, N, d), padding = q.shape, q[:, 0, :, 0] < 0 if pad else None
        if d <= 64 or q.dtype.itemsize == 2:                      # beyond, fp32 spills
            k._forward_triton(q, q, q, padding, rows[:R], N, d**-.5)
            k._backward_triton(q, q, q, q, padding, q, new(B, H, 2, N, acc=True), N, d**-.5)


def slot_attention(k, new):
    for S, D in ((11, 64), (100, 64))[:1 + (new(1).dtype.itemsize == 2)]:         # fp32 holds the first
        q, x = new(2, S, D), new(2, 1024, D)
        u, den = new(2, S, D, acc=True), new(2, S, 1, acc=True)
        mask, off, da = x[:, :, 0] > 0, q[:, :, 0] > 0, new(2, S, 1024, acc=True)
        k._forward_triton(q, x, x, mask, off, 1e-8, .1, True)
        k._backward_triton(u, da, q, x, x, mask, off, u, den, 1e-8, .1)


def augment(k, new):                                              # BYOL's second view, and SimCLR's of floats
    flag, factors = new(64, acc=True).bool(), new(64, 4, acc=True)
    p = k.Params(factors.long(), flag, factors, factors.long(), flag, new(64, acc=True), flag)
    k._forward_triton(new(64, 3, 256, 256).byte(), p, 224)
    k._forward_triton(new(64, 3, 32, 32), p._replace(sigma=None, solarise=None), 32)


def sinkhorn(k, new):
    s, f, g = new(1024, 3000), new(1024, acc=True), new(3000, acc=True)
    k._columns_triton(s, g, f, .05)                               # and the merge of its splits
    k._rows_triton(s, g, g, .05)
    k._codes_triton(s, g, g, .05)


LAUNCHES = {"contrastive": contrastive, "sinkhorn": sinkhorn, "augment": augment,
            "attention": attention, "prototype_ce": prototype_ce,
            "prototype_features": prototype_features, "cross_correlation": cross_correlation,
            "clip": clip, "info_nce": info_nce, "slot_attention": slot_attention}
CASES = [(name, kind, target) for name in LAUNCHES for kind in TYPES for target in TARGETS
         if kind != "tf32" or target.startswith("sm_")]


# ---- the child: python test_cross_compile.py contrastive

def compile_all(name):
    import importlib

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
             torch.uint8: "u8", torch.bool: "i1"}
    launches = []

    def record(kernel, *args, grid, warmup, **options):
        launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | options))

    def source(kernel, values):
        """What the launcher would ask for: 1 is a constant, and so is what divides by 16 an attribute."""
        signature, constants, attributes = {}, {}, {}
        for i, p in enumerate(kernel.params):
            v = values.pop(p.name)
            if p.is_constexpr or v is None or type(v) is int and v == 1:
                signature[p.name], constants[p.name] = "constexpr", v
            elif isinstance(v, float):
                signature[p.name] = p.annotation_type or "fp32"
            else:
                signature[p.name] = "*" + names[v.dtype] if torch.is_tensor(v) else "i32"
                if torch.is_tensor(v) or v % 16 == 0:
                    attributes[i,] = [["tt.divisibility", 16]]
        return ASTSource(kernel, signature, constants, attributes)

    def spills(asm):
        if "amdgcn" in asm:
            return sum(map(int, re.findall(r"\.vgpr_spill_count: *(\d+)", asm["amdgcn"])))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(asm["cubin"])
            f.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", f.name]
            usage = subprocess.check_output(command, text=True)
        return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))

    def tensor(dtype, *shape, acc=False):
        return torch.empty(shape, dtype=torch.float32 if acc else dtype)

    JITFunction.run = record
    module = importlib.import_module(f"kernels.{name}")
    for kind, target in (case[1:] for case in CASES if case[0] == name):
        backend, arch, warp, shared, instruction = TARGETS[target]
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        new = functools.partial(tensor, torch.bfloat16 if kind == "bf16" else torch.float32)
        module._shared_memory = lambda z, shared=shared: shared
        launches.clear()
        LAUNCHES[name](module, new)
        for kernel, values in launches:
            row = dict(case=[name, kind, target], kernel=kernel.fn.__name__)
            try:
                c = triton.compile(source(kernel, values), GPUTarget(backend, arch, warp), options=values)
                text = c.asm["amdgcn" if backend == "hip" else "ptx"]
                row |= dict(shared=c.metadata.shared, spills=spills(c.asm), tensor_cores=instruction in text,
                            dots=c.asm["ttir"].count("tt.dot "))
            except Exception as e:
                row |= dict(error=f"{type(e).__name__}: {e}")
            print(json.dumps(row))


# ---- the tests

@functools.cache
def compiled(name):                                               # what its child printed
    pytest.importorskip("triton", reason="cross-compilation needs triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(PYTHONPATH=str(ROOT))
    out = subprocess.run([sys.executable, __file__, name], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return [json.loads(line) for line in out.stdout.splitlines()]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_compiles(case):
    rows = [r for r in compiled(case[0]) if r["case"] == list(case)]
    assert rows
    for r in rows:
        assert "error" not in r, r["kernel"] + ": " + r["error"]
        assert r["shared"] <= TARGETS[case[2]][3], r
        assert r["spills"] <= SPILLS.get(tuple(case), 0), r
        assert r["tensor_cores"] or not r["dots"] or case[1] == "fp32", r


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda file: file.stem)
def test_every_kernel_is_listed(file):
    """A kernel is a jitted function that stores. Its file is in LAUNCHES, and a case launches it."""
    kernels = re.findall(r"@triton\.jit\n\s*def (\w+)\((?:(?!\n\n).)*?tl\.store", file.read_text(), re.S)
    launched = {r["kernel"] for r in compiled(file.stem)} if file.stem in LAUNCHES else set()
    assert set(kernels) <= launched, f"no case in LAUNCHES compiles {set(kernels) - launched}"


if __name__ == "__main__":
    compile_all(sys.argv[1])
