"""Two lessons of the lecture, as pictures with the numbers behind them.

    python results/lessons.py matrix                  SimCLR's Figure 5, pairs of transformations
    python results/lessons.py batch_sizes [--seed K]  SimCLR and MoCo, 32 to 1,024 images a step; seeds 0 1 2

Batch sizes: SimCLR's negatives are the rest of its batch, MoCo's are keys of earlier batches. Every run sees
89,600 images; the rate goes with the square root of the batch size, as is usual with AdamW. What has been run
is not run again.
"""
import json
import re
import shutil
import statistics
import subprocess
import sys

from table import ROOT, origin, read, run_all

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


def batch_sizes(seeds):
    for size in SIZES:
        run_all([f"variants-batch_sizes:{name}" for name in METHODS], flags(size) + seeds)
    draw(read(ROOT / "results/variants-batch_sizes.jsonl"), ROOT / "results/batch_sizes.png")


def matrix():
    """results/matrix.json: the linear probe of each pair, by the pair's place in the matrix."""
    command = ["methods/simclr.py", "--matrix", "--steps", "200", "--data", "toys:n=6000"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    rows = [json.loads(file.read_text()) for file in sorted((ROOT / "runs/matrix").glob("*/*/result.json"))]
    pairs = {row["flags"]["only"]: dict(linear=row["linear"], knn=row["knn"]) for row in rows}
    whole = dict(command=" ".join(["python", *command]), seed=rows[0]["seed"], untrained=rows[0]["untrained"],
                 **origin(), pairs=pairs)
    (ROOT / "results/matrix.json").write_text(json.dumps(whole, indent=1))
    shutil.copy(ROOT / "runs/matrix.png", ROOT / "results/matrix.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["matrix"]:
        matrix()
    elif sys.argv[1:2] == ["batch_sizes"]:
        batch_sizes(sys.argv[2:])
    else:
        print(__doc__)
