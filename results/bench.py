"""How long the kernels take, beside plain PyTorch, torch.compile and what bounds them.

    python results/bench.py                       every kernel, forward and backward
    python results/bench.py contrastive sinkhorn  these files alone
    python results/table.py                       the README's tables, from what is committed

Each line: median and the 20 % and 80 % quantiles of the time; the share of the bound, which is the rate of a
bare bf16 GEMM or of a copy, both measured in the same run; the memory that the call needs beyond its inputs.
Every run appends to results/kernels-<gpu>.jsonl with versions, driver and commit. On a CPU the kernels do not
run: there it times what is an algorithm, not a kernel.
"""
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)


class Case(NamedTuple):
    inputs: list                     # tensors; a gradient is taken for those that require one
    ways: dict                       # name -> function of the inputs; the first is ours
    flops: float = 0.                # of the GEMMs that have to be made, forward and backward
    bytes: float = 0.                # that have to be moved
    images: int = 0                  # made by one call


def kernel(file):
    return importlib.import_module(f"kernels.{file}")


def randn(*shape, grad=True, unit=False):
    x = torch.randn(shape, device=DEVICE)
    return (F.normalize(x, dim=-1) if unit else x).to(DTYPE).requires_grad_(grad)


# ---- what is measured: shapes that papers use

def nt_xent(N, D):
    k = kernel("contrastive")
    ways = {"ours": partial(k.nt_xent, tau=.1), "eager": partial(k.nt_xent_reference, tau=.1)}
    return Case([randn(N, D, unit=True)], ways, flops=6 * N * N * D)


def clip(N, D):
    k = kernel("clip")
    ours = partial(k.clip_loss, scale=50.)
    ways = {"ours": ours, "eager": partial(ours, impl="reference")}
    return Case([randn(N, D, unit=True), randn(N, D, unit=True)], ways, flops=8 * N * N * D)


def bank(B, M, D):
    k, target = kernel("info_nce"), torch.randint(M, (B,), device=DEVICE)
    ways = {"ours": lambda q, x: k.info_nce(q, x, target, .07),
            "eager": lambda q, x: k.info_nce(q, x, target, .07, impl="reference")}
    if hasattr(F, "linear_cross_entropy"):
        ways["F.linear_cross_entropy"] = lambda q, x: F.linear_cross_entropy(q / .07, x, target)
    inputs = [randn(B, D, unit=True), randn(M, D, grad=False, unit=True)]
    return Case(inputs, ways, flops=6 * B * M * D)


def barlow(N, D):
    k = kernel("cross_correlation")
    ways = {"ours": partial(k.barlow_twins_loss, lam=.005),
            "eager": partial(k.barlow_twins_loss, lam=.005, impl="reference")}
    return Case([randn(N, D), randn(N, D)], ways, flops=min(8 * N * N * D, 6 * N * D * D))


def attention(B, H, N, d):
    k = kernel("attention")
    ways = {"ours": k.attention, "eager": partial(k.attention, impl="reference"),
            "SDPA": F.scaled_dot_product_attention}
    return Case([randn(B, H, N, d) for _ in range(3)], ways, flops=14 * B * H * N * N * d)


def slots(B, N, S, D):
    k = kernel("slot_attention")
    ways = {"ours": k.slot_attention, "eager": partial(k.slot_attention, impl="reference")}
    return Case([randn(B, S, D), randn(B, N, D), randn(B, N, D)], ways, bytes=6 * B * N * D * DTYPE.itemsize)


def slots_forward(B, N, S, D):
    _, ways, *_ = slots(B, N, S, D)
    return Case([randn(B, n, D, grad=False) for n in (S, N, N)], ways, bytes=2 * B * N * D * DTYPE.itemsize)


def prototypes(R, K):
    k = kernel("prototype_ce")
    options = dict(tau_s=.1, tau_t=.04)
    ways = {"ours": partial(k.prototype_ce, **options), "eager": partial(k.prototype_ce_reference, **options)}
    return Case([randn(R, K), randn(R, K, grad=False)], ways, bytes=5 * R * K * DTYPE.itemsize)


def prototype_features(R, D, K):
    k = kernel("prototype_features")
    ours = partial(k.prototype_ce_features, tau_s=.1, tau_t=.04)
    inputs = [randn(R, D, unit=True), randn(K, D, unit=True)]
    inputs += [randn(R, D, grad=False, unit=True), randn(K, D, grad=False, unit=True)]
    return Case(inputs, {"ours": ours, "eager": partial(ours, impl="reference")}, flops=8 * R * D * K)


def sinkhorn(B, K):
    k = kernel("sinkhorn")
    ways = {"ours": k.sinkhorn, "eager": partial(k.sinkhorn, impl="reference")}
    return Case([randn(B, K, grad=False)], ways, bytes=8 * B * K * DTYPE.itemsize)


def views(B, side):
    k, x = kernel("views"), torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8, device=DEVICE)
    def eager(x):                                                # what torch.compile can see through
        return kernel("augment").apply_reference(x, k.draw(B, side, side, device=DEVICE), side)
    return Case([x], {"ours": k.views, "eager": eager}, bytes=15 * B * side * side, images=B)


def gram(N, D):
    k = kernel("cross_correlation")
    ways = {how: partial(k.barlow_twins_loss, lam=.005, impl=impl)
            for how, impl in (("Gram form, N x N", "gram"), ("direct, D x D", "reference"))}
    return Case([randn(N, D), randn(N, D)], ways)


def two_views(B, side):
    k, x = kernel("views"), torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8)
    one = lambda x: [k.views(image[None]) for image in x.repeat(2, 1, 1, 1)]     # noqa: E731
    ways = {"batched tensors": lambda x: (k.views(x), k.views(x)), "one image at a time": one}
    return Case([x], ways, images=B)


CASES = [  # file, name, case, shape; goals on an H200: ours at most so many ms and MiB, at least so many %,
    # another way at least so many times as long
    ("contrastive", "NT-Xent", nt_xent, dict(N=8192, D=128)),
    ("contrastive", "NT-Xent", nt_xent, dict(N=32768, D=128),
     {"ms": 2.6, "extra_mib": 1, "percent": 40, "eager": 6, "torch.compile": 1.7}),
    ("contrastive", "NT-Xent", nt_xent, dict(N=65536, D=256)),
    ("clip", "CLIP", clip, dict(N=32768, D=768), {"ms": 14, "extra_mib": 400, "percent": 60, "eager": 2.5}),
    ("info_nce", "memory bank", bank, dict(B=256, M=1_281_167, D=128), {"ms": .9, "eager": 5}),
    ("cross_correlation", "Barlow Twins", barlow, dict(N=1024, D=8192), {"eager": 10}),
    ("cross_correlation", "Barlow Twins", barlow, dict(N=4096, D=2048), {"percent": 75, "eager": 1.5}),
    ("attention", "attention", attention, dict(B=32, H=16, N=1024, d=64), {"SDPA": .6}),
    ("attention", "attention", attention, dict(B=128, H=12, N=197, d=64), {"SDPA": .8}),
    ("slot_attention", "slot attention", slots, dict(B=64, N=16384, S=11, D=64), {"eager": 2}),
    ("slot_attention", "slots, forward", slots_forward, dict(B=64, N=16384, S=11, D=64), {"percent": 75}),
    ("prototype_ce", "DINO cross-entropy", prototypes, dict(R=8192, K=65536),
     {"percent": 80, "eager": 6, "torch.compile": 2}),
    ("prototype_features", "DINO, no logits", prototype_features, dict(R=32768, D=256, K=131072),
     {"extra_mib": 1024}),
    ("sinkhorn", "Sinkhorn", sinkhorn, dict(B=4096, K=65536),
     {"ms": 1.4, "percent": 70, "eager": 6, "torch.compile": 2.5}),
    ("views", "SimCLR's view", views, dict(B=256, side=224), {"eager": 10}),
    ("views", "SimCLR's view", views, dict(B=512, side=32))]
ON_A_CPU = [("cross_correlation", "Barlow Twins", gram, dict(N=256, D=4096)),
            ("views", "SimCLR's two views", two_views, dict(B=256, side=32))]


# ---- how

def step(f, inputs):
    """One forward pass, and one backward where something needs a gradient."""
    leaves = [x for x in inputs if x.requires_grad]

    def call():
        out = f(*inputs)
        return torch.autograd.grad(out.sum(), leaves) if leaves else out
    return call


def times(call):
    """Median, 20 % and 80 % quantile, in milliseconds."""
    if GPU:
        from triton.testing import do_bench
        return do_bench(call, warmup=25, rep=500, quantiles=[.5, .2, .8])
    call()
    seconds = []
    while len(seconds) < 5 or sum(seconds) < 1 and len(seconds) < 50:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    low, _, _, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return [1000 * s for s in (statistics.median(seconds), low, high)]


def extra_memory(call):
    """MiB above what is held already."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def rates():
    """FLOP/s of a bare GEMM and bytes/s of a copy on this machine."""
    n = 8192 if GPU else 1024
    a, big = randn(n, n, grad=False), torch.empty(2 ** (30 if GPU else 26), dtype=torch.uint8, device=DEVICE)
    gemm, copy = times(lambda: a @ a)[0], times(big.clone)[0]
    return 2e3 * n ** 3 / gemm, 2e3 * big.numel() / copy


def measure(case, gemm, copy):
    """A row for each way; one that fails says why, and the others go on."""
    torch._dynamo.reset()                                        # else later cases are compiled for any shape
    compiled = {} if not GPU else {"torch.compile": torch.compile(case.ways["eager"], dynamic=False)}
    for way, f in (case.ways | compiled).items():
        call = step(f, case.inputs)
        try:
            median, low, high = times(call)
            row = dict(way=way, ms=round(median, 4), low=round(low, 4), high=round(high, 4))
            if GPU:
                row["extra_mib"] = round(extra_memory(call), 2)
        except torch.OutOfMemoryError:
            row = dict(way=way, error="out of memory")
        except Exception as e:                                   # of Triton, of the compiler
            row = dict(way=way, error=" ".join(str(e).split())[:80] or type(e).__name__)
        if "ms" in row and (case.flops or case.bytes):
            bound = 1000 * (case.flops / gemm if case.flops else case.bytes / copy)
            row |= dict(percent=round(100 * bound / row["ms"], 1), of="GEMM" if case.flops else "copy")
        if "ms" in row and case.images:
            row["images_per_second"] = round(1000 * case.images / row["ms"])
        yield row


def conditions():
    def first(*command):
        try:
            return subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[0].strip()
        except (OSError, subprocess.CalledProcessError, IndexError):
            return ""
    import table
    try:
        from triton import __version__ as triton
    except ImportError:                                          # as on a Mac
        triton = "none"
    return dict(machine=torch.cuda.get_device_name() if GPU else table.machine(), torch=torch.__version__,
                triton=triton, python=sys.version.split()[0],
                driver=GPU and first("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
                commit=first("git", "describe", "--always", "--dirty"), date=time.strftime("%Y-%m-%d"),
                command=" ".join(["python results/bench.py", *sys.argv[1:]]))


def draw(file, rows):
    """Time beside eager's, a bar each; a shape a panel."""
    from matplotlib.figure import Figure
    shapes = list(dict.fromkeys((r["name"], r["shape"]) for r in rows))
    figure = Figure((9, .4 * len(rows) + .5 * len(shapes)), layout="tight")
    sizes = [sum((r["name"], r["shape"]) == s for r in rows) for s in shapes]
    axes = figure.subplots(len(shapes), squeeze=False, gridspec_kw=dict(height_ratios=sizes))[:, 0]
    for axis, shape in zip(axes, shapes, strict=True):
        mine = [r for r in rows if (r["name"], r["shape"]) == shape][::-1]
        bars = axis.barh([r["way"] for r in mine], [r.get("ms", 0) for r in mine], height=.7,
                         color=["C0" if r["way"] == "ours" else "silver" for r in mine])
        labels = [f"{r['ms']:.3g} ms" if "ms" in r else r["error"] for r in mine]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_title(f"{shape[0]}, {shape[1]}", loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=.15)
    figure.savefig(file, dpi=110)


def line(r):
    """A row as text."""
    text = f"{r['name']:20}{r['shape']:26}{r['way']:22}"
    if "error" in r:
        return text + r["error"]
    text += f"{r['ms']:9.3f} ms ({r['low']:.3f} to {r['high']:.3f})"
    text += f"{r['percent']:8.1f} % of {r['of']}" if "percent" in r else ""
    text += f"{r['extra_mib']:10.1f} MiB" if "extra_mib" in r else ""
    text += f"{r['images_per_second']:10} images/s" if "images_per_second" in r else ""
    text += f", {r['times_ours']:.3g} x ours" if "times_ours" in r else ""
    units = dict(ms="most {} ms", extra_mib="most {} MiB", percent="least {} %", times_ours="least {} x")
    goals = ", ".join("at " + units[k].format(goal) for k, goal in r["goals"].items())
    return text + f"; goal {goals}" * bool(goals)


def main(files=()):
    wanted = [c for c in (CASES if GPU else ON_A_CPU) if not files or c[0] in files]
    if not wanted:
        sys.exit(f"bench.py: nothing to measure of {' '.join(files)}: on {DEVICE} there are "
                 + " ".join({c[0]: 0 for c in (CASES if GPU else ON_A_CPU)}))
    if not GPU:
        torch.set_num_threads(1)                                 # a second is a CPU-second
    about, (gemm, copy), rows = conditions(), rates(), []
    print(f"{about['machine']}, torch {about['torch']}, triton {about['triton']}, {DTYPE}: bare GEMM "
          f"{gemm / 1e12:.3g} TFLOP/s, copy {copy / 1e9:.4g} GB/s, read and written", flush=True)
    gpu = re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-") if GPU else "cpu"
    for file, name, make, shape, *goals in wanted:
        text, first = " ".join(f"{k}={v}" for k, v in shape.items()), None
        for row in measure(make(**shape), gemm, copy):
            first = first or row
            if row is not first and "ms" in row and "ms" in first:
                row["times_ours"] = round(row["ms"] / first["ms"], 3)
            goal = goals[0] if goals else {}
            row["goals"] = {k: goal[k] for k in ("ms", "extra_mib", "percent") if k in goal} if row is first \
                else {"times_ours": goal[row["way"]]} if row["way"] in goal else {}
            rows.append(dict(kernel=file, name=name, shape=text) | row | about)
            print(line(rows[-1]), flush=True)
            with open(ROOT / f"results/kernels-{gpu}.jsonl", "a") as f:      # kept if a later one breaks
                f.write(json.dumps(rows[-1]) + "\n")
    draw(ROOT / f"results/kernels-{gpu}.png", rows)
    if not GPU:
        print("One core. The kernels need a GPU; these are the algorithms that pay on a CPU too.")


if __name__ == "__main__":
    main(sys.argv[1:])
