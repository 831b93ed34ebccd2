"""Runs every method and writes the README's tables from what was measured.

    python results/table.py all [--flags]    run what is missing of every method, seeds 0 1 2, or --seed K
    python results/table.py rotnet,simclr [--flags]          the same of these
    python results/table.py variants-NAME:rotnet [--flags]   the same into that file, compared by command
    python results/table.py pictures         draw toys.png, copy what the runs with seed 0 have drawn
    python results/table.py                  write the tables between the marks in README.md

A line of results/<data>.jsonl is a run's result.json with its command, commit and machine; nothing else gets
into a table. Its seconds do not where the run did not have the machine for itself.
"""
import ast
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROBES = ["k-NN, %", "linear, %", "untrained: k-NN, linear", "linear by layer"]
COLUMNS = ["method", "year", "idea", "lines", "seconds", *PROBES]

PICTURES = dict(                                                 # of the runs with seed 0
    mae="mae-toys-seed0/reconstructions", rotnet="rotnet-toys-seed0/attention",
    simclr="simclr-toys-seed0/neighbours",
    video_colorization="video_colorization-toys-objects=3-frames=6-n=4000-seed0/carried",
    exemplar_cnn="exemplar_cnn-toys-seed0/distortions",
    context_prediction="context_prediction-toys-n=10000-seed0/alike",
    jigsaw="jigsaw-toys-n=8000-seed0/puzzles", colorization="colorization-toys-seed0/colours",
    split_brain="split_brain-toys-seed0/told", context_encoder="context_encoder-toys-seed0/painted",
    barlow_twins="barlow_twins-toys-seed0/correlation", vicreg="vicreg-toys-seed0/covariance",
    dino="dino-toys-grey-seed0/attention", swav="swav-toys-grey-seed0/prototypes",
    bownet="bownet-toys-seed0/words", ibot="ibot-toys-grey-seed0/masks", beit="beit-toys-seed0/words",
    simmim="simmim-toys-seed0/reconstructions", pixelcnn="pixelcnn-toys-n=4000-noise=0-seed0/samples",
    igpt="igpt-toys-n=6000-noise=0-seed0/completions", igpt_layers="igpt-toys-n=6000-noise=0-seed0/layers")


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def methods():
    """(name, title, year, idea, lines) of each method, by year; from the first line of its docstring."""
    rows = []
    for file in (ROOT / "methods").glob("*.py"):
        text = file.read_text()
        first = re.match(r"(.+?) \((\d{4})\): (.+)\.\n", ast.get_docstring(ast.parse(text)))
        rows.append((file.stem, first[1], int(first[2]), first[3], len(text.splitlines())))
    return sorted(rows, key=lambda row: (row[2], row[1]))


def head(columns):
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def mean(values, digits=1):
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if values[1:] else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def source(file):
    """Below each table of runs: seeds, machines, where the lines are."""
    results, name = read(file), f"results/{file.name}"
    seeds = ", ".join(map(str, sorted({r["seed"] for r in results})))
    spread = ", mean ± standard deviation" if "," in seeds else " alone"
    machines = " and ".join(dict.fromkeys(r["machine"] for r in results))
    return (f"Seeds: {seeds}{spread}. {machines}, torch {results[0]['torch']};\n"
            f"the command and the commit of each run are in [{name}]({name}).")


def by_layer(rows):
    """The linear probe of every layer, and before training; blank where they were not probed."""
    layers = [r["layers"] for r in rows if "layers" in r and "untrained" in r["layers"]["layer 1"]]
    now = {k: statistics.mean(x[k]["linear"] for x in layers) for k in (layers or [{}])[0]}
    before = {k: statistics.mean(x[k]["untrained"]["linear"] for x in layers) for k in now}
    return ", ".join(f"{now[k]:.0f} ({before[k]:.0f})" for k in now)


def table(file):
    """The table of a results file: mean and standard deviation over the seeds."""
    results, lines = read(file), head(COLUMNS)
    if not results:
        return "Not measured yet."
    for name, title, year, idea, length in methods():
        rows = [r for r in results if r["method"] == name]
        if not rows:
            continue
        quiet = [r["seconds"] for r in rows if not r.get("busy")]
        seconds = f"{statistics.mean(quiet):.0f}" if quiet else ""
        knn, linear = (mean(r[key] for r in rows) for key in ("knn", "linear"))
        before = ", ".join(mean(r["untrained"][key] for r in rows) for key in ("knn", "linear"))
        lines.append(f"| [{title}](methods/{name}.py) | {year} | {idea} | {length} | {seconds} "
                     f"| {knn} | {linear} | {before} | {by_layer(rows)} |")
    pixels = results[0]["pixels"]
    lines.append(f"\nPixels, reduced to 16 x 16: k-NN {pixels['knn']:.1f}, linear {pixels['linear']:.1f}.")
    lines.append(source(file))
    return "\n".join(lines)


def variants_table(file):
    """Commands side by side, with what the method itself measures. First each method as it is."""
    groups, results = {}, read(file)
    if not results:
        return "Not measured yet."
    names = {r["method"] for r in results}
    for r in [r for r in read(ROOT / "results/toys.jsonl") if r["method"] in names] + results:
        groups.setdefault(re.sub(r" --seed \d+", "", r["command"]), []).append(r)
    own = {}                                                     # in a row: ..., untrained, own, loss, ...
    for one in (list(rows[0].items()) for rows in groups.values()):
        names = [k for k, _ in one]
        own |= {k: 0 for k, value in one[names.index("untrained") + 1:names.index("loss")]
                if isinstance(value, float)}
    own |= {k: 0 for k in ("z_std", "z_rank", "perplexity") if "collapse" in file.name}
    lines = head(["command", "loss", *(k.replace("_", " ") for k in own), *PROBES])
    for command, rows in groups.items():
        before = ", ".join(mean(r["untrained"][key] for r in rows) for key in ("knn", "linear"))
        cells = [f"`{command}`", mean((r["loss"] for r in rows), 3)]
        for k in own:
            digits = next(d for d, above in ((1, 10), (2, 2), (3, -1)) if rows[0].get(k, 0) > above)
            cells.append(mean((r[k] for r in rows), digits) if k in rows[0] else "")
        cells += [mean(r[k] for r in rows) for k in ("knn", "linear")]
        lines.append(f"| {' | '.join([*cells, before, by_layer(rows)])} |")
    return "\n".join(lines + ["", source(file)])


def kernel_table(file):
    """What bench.py measured last: a line for each way to compute the same."""
    rows = list({(r["name"], r["shape"], r["way"]): r for r in read(file)}.values())
    lines = head(["what", "shape", "how", "ms (20 to 80 %)", "of bound", "extra MiB", "images/s"])
    for r in rows:
        ms = f"{r['ms']:.3g} ({r['low']:.3g} to {r['high']:.3g})" if "ms" in r else r["error"]
        bound = f"{r['percent']:.0f} % of {r['of']}" if "percent" in r else ""
        cells = [r["name"], r["shape"], r["way"], ms, bound]
        cells += [str(r.get(key, "")) for key in ("extra_mib", "images_per_second")]
        lines.append(f"| {' | '.join(cells)} |")
    name, one = f"results/{file.name}", rows[-1]
    lines.append(f"\n{one['machine']}, torch {one['torch']}, triton {one['triton']};")
    lines.append(f"the command and the commit of each line are in [{name}]({name}).")
    return "\n".join(lines)


def readme(text):
    """`text` with the table of each results file between its marks."""
    def fill(m):
        how = dict(kernels=kernel_table, variants=variants_table).get(m[2][8:].split("-")[0], table)
        return f"{m[1]}{how(ROOT / m[2])}\n{m[3]}"
    return re.sub(r"(<!-- (results/[\w.=-]+\.jsonl) -->\n).*?(<!-- end -->)", fill, text, flags=re.S)


def machine():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else [platform.machine()]
    return f"{os.cpu_count()} cores of {names[0]}"


def origin():
    """The commit that is checked out, "-dirty" where the code differs from it, and the machine."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "diff", "--quiet", "HEAD", "--", "methods", "kernels", "common.py"]).returncode
    return dict(commit=commit + "-dirty" * bool(changed), machine=machine())


def run_all(names, flags):
    """What has no line yet. The flags go to every method; the data among them names the file, or names[0]."""
    data = flags[flags.index("--data") + 1] if "--data" in flags else "toys"
    place, _, first = names[0].rpartition(":")
    file = ROOT / "results" / ((place or re.sub(r"[^a-z0-9]+", "-", data.lower())) + ".jsonl")
    at = flags.index("--seed") if "--seed" in flags else len(flags)
    seeds, flags = flags[at + 1:at + 2] or ["0", "1", "2"], flags[:at] + flags[at + 2:]
    for seed in seeds:
        for name in (first, *names[1:]):
            command = [f"methods/{name}.py", "--seed", seed, *flags]
            line = " ".join(["python", *command])
            if any((r["method"], r["seed"]) == (name, int(seed)) and (r["command"] == line or not place)
                   for r in read(file)):
                continue
            run_one(command, file, (ROOT / "runs").glob(f"{name}-*-seed{seed}/result.json"))


def run_one(command, file, results):
    """Run it; the newest of the `results` that it may have written becomes a line of `file`."""
    print("python", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    row = json.loads(max(results, key=lambda f: f.stat().st_mtime).read_text())
    row |= dict(command=" ".join(["python", *command]), **origin())
    if os.getloadavg()[1] > os.cpu_count() + 1 or "OMP_NUM_THREADS" in os.environ:
        row["busy"] = True                                       # five minutes' load, or fewer threads
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
    Image.open(ROOT / "results/toys.png").convert("RGB").quantize(256).save(ROOT / "results/toys.png")
    for name, picture in PICTURES.items():
        if (file := ROOT / f"runs/{picture}.png").exists():
            Image.open(file).convert("RGB").save(ROOT / f"results/{name}.png", optimize=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pictures"]:
        pictures()
    elif sys.argv[1:]:
        names = [name for name, *_ in methods() if name != "transfer"]
        run_all(names if sys.argv[1] == "all" else sys.argv[1].split(","), sys.argv[2:])
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text()))
