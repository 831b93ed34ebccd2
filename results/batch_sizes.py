"""SimCLR and MoCo over batch sizes, at equal images seen: 32 to 1,024 images a step.

    python results/batch_sizes.py [--seed K]     run what is missing of seeds 0 1 2, then draw batch_sizes.png

SimCLR's negatives are the rest of its batch, MoCo's are keys of earlier batches. Every run sees 89,600
images; the rate goes with the square root of the batch size, as is usual with AdamW.
"""
import re
import statistics
import sys

from table import ROOT, read, run_all

SIZES, IMAGES, RATE = (32, 64, 128, 256, 512, 1024), 89_600, 1e-3
METHODS = dict(simclr="SimCLR", moco="MoCo v2")


def flags(size):
    lr = f"{RATE * (size / 128) ** .5:.2g}"
    return ["--batch_size", str(size), "--steps", str(round(IMAGES / size)), "--lr", lr]


def draw(rows, path):
    """The linear probe over the batch size: mean and deviation over the seeds."""
    from matplotlib.figure import Figure
    figure = Figure((5, 3.2), layout="tight")
    axis = figure.subplots()
    for name, title in METHODS.items():
        found = {}
        for r in (r for r in rows if r["method"] == name):
            size = int(re.search(r"--batch_size (\d+)", r["command"])[1])
            found.setdefault(size, []).append(r["linear"])
        sizes, values = zip(*sorted(found.items()), strict=True)
        spread = [statistics.stdev(v) if v[1:] else 0. for v in values]
        axis.errorbar(sizes, list(map(statistics.mean, values)), spread, marker="o", capsize=3, label=title)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="batch size", ylabel="linear probe, %", xticks=SIZES, xticklabels=SIZES)
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    for size in SIZES:
        run_all([f"variants-batch_sizes:{name}" for name in METHODS], flags(size) + sys.argv[1:])
    draw(read(ROOT / "results/variants-batch_sizes.jsonl"), ROOT / "results/batch_sizes.png")
