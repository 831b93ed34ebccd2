"""Runs every method and writes the README's tables from what was measured.

    python results/table.py all [--flags]    run what is missing of every method, seeds 0 1 2
    python results/table.py rotnet,simclr [--flags]          the same of these
    python results/table.py pictures         draw toys.png, copy the pictures of the runs with seed 0
    python results/table.py                  write the tables between the marks in README.md

A line of results/<data>.jsonl is a run's result.json with its command, commit and machine; nothing else gets
into a table.
"""
import ast
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """| method | year | idea | lines | seconds | k-NN, % | linear, % | untrained: k-NN, linear |
|---|---|---|---|---|---|---|---|"""


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def methods():
    """(name, title, year, idea, lines) of each method, by year; from the first line of its docstring."""
    rows = []
    for file in (ROOT / "methods").glob("*.py"):
        text = file.read_text()
        first = re.match(r"(.+?) \((\d{4})\): (.+)\.\n", ast.get_docstring(ast.parse(text)))
        rows.append((file.stem, first[1], int(first[2]), first[3], len(text.splitlines())))
    return sorted(rows, key=lambda row: row[2])


def mean(values):
    values = list(values)
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if values[1:] else "")


def table(file):
    """The table of a results file: mean and standard deviation over the seeds."""
    results, lines = read(file), [HEAD]
    if not results:
        return "Not measured yet."
    for name, title, year, idea, length in methods():
        rows = [r for r in results if r["method"] == name]
        if not rows:
            continue
        seconds = statistics.mean(r["seconds"] for r in rows)
        knn, linear = (mean(r[key] for r in rows) for key in ("knn", "linear"))
        before = ", ".join(mean(r["untrained"][key] for r in rows) for key in ("knn", "linear"))
        lines.append(f"| [{title}](methods/{name}.py) | {year} | {idea} | {length} | {seconds:.0f} "
                     f"| {knn} | {linear} | {before} |")
    one, name = results[0], f"results/{file.name}"
    seeds = ", ".join(map(str, sorted({r["seed"] for r in results})))
    spread = ", mean ± standard deviation" if "," in seeds else " alone"
    pixels = f"k-NN {one['pixels']['knn']:.1f}, linear {one['pixels']['linear']:.1f}"
    lines += [f"\nSeeds: {seeds}{spread}. Pixels, reduced to 16 x 16: {pixels}.", f"{one['machine']}, "
              f"torch {one['torch']}; the command and the commit of each run are in [{name}]({name})."]
    return "\n".join(lines)


def readme(text):
    """`text` with the table of each results file between its marks."""
    marks = r"(<!-- (results/[\w-]+\.jsonl) -->\n).*?(<!-- end -->)"
    return re.sub(marks, lambda m: f"{m[1]}{table(ROOT / m[2])}\n{m[3]}", text, flags=re.S)


def machine():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else [platform.machine()]
    return f"{os.cpu_count()} cores of {names[0]}"


def run_all(names, flags):
    """What has no line yet. The flags go to every method; the data among them names the file."""
    data = flags[flags.index("--data") + 1] if "--data" in flags else "toys"
    file = ROOT / "results" / (re.sub(r"[^a-z0-9]+", "-", data.lower()) + ".jsonl")
    for seed in (0, 1, 2):
        for name in names:
            if any((r["method"], r["seed"]) == (name, seed) for r in read(file)):
                continue
            command = [f"methods/{name}.py", "--seed", str(seed), *flags]
            print("python", *command, flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
            folders = (ROOT / "runs").glob(f"{name}-*-seed{seed}/result.json")
            row = json.loads(max(folders, key=lambda f: f.stat().st_mtime).read_text())
            git = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True)
            row |= dict(command=" ".join(["python", *command]), commit=git.strip(), machine=machine())
            with open(file, "a") as f:
                f.write(json.dumps(row) + "\n")


def pictures():
    sys.path.insert(0, str(ROOT))
    from PIL import Image

    from common import save_grid
    from kernels.toys import CLASSES, toys
    calm = toys(400, seed=5, size=64, small=.3, contrast=.25, noise=.01)
    save_grid(ROOT / "results/toys.png", {name: calm["images"][calm["labels"] == i][:12]
                                          for i, name in enumerate(CLASSES)})
    for name, picture in dict(mae="reconstructions", rotnet="attention", simclr="neighbours").items():
        shutil.copy(ROOT / f"runs/{name}-toys-seed0/{picture}.png", ROOT / f"results/{name}.png")
    for file in (ROOT / "results").glob("*.png"):                # 256 colours: a quarter of the bytes
        Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pictures"]:
        pictures()
    elif sys.argv[1:]:
        names = [name for name, *_ in methods()]
        run_all(names if sys.argv[1] == "all" else sys.argv[1].split(","), sys.argv[2:])
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text()))
