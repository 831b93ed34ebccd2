"""Runs every method and writes the tables of README.md and results/README.md from what was measured.

    python results/table.py all [--flags]    run what is missing of every method, seeds 0 1 2, or --seed K
    python results/table.py rotnet,simclr [--flags]          the same of these
    python results/table.py variants-NAME:rotnet [--flags]   the same into that file, compared by command
    python results/table.py logs             run each method that has no log yet with seed 0, keep its log
    python results/table.py curves           draw curves.png from the logs
    python results/table.py pictures         that, toys.png, what the runs with seed 0 have drawn, gallery.png
    python results/table.py                  write the tables between the marks of both pages

A line of results/<data>.jsonl is a run's result.json with its command, commit and machine; nothing else gets
into a table. Its seconds do not where the run did not have the machine for itself. A log's first line is the
same about its run, then comes what was logged. papers.json has what the papers say, and where that was read.
"""
import ast
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "README.md", ROOT / "results/README.md"
PROBES = ["k-NN, %", "linear, %", "untrained: k-NN, linear", "linear by layer"]
COLUMNS = ["method", "year", "idea", "lines", "seconds", *PROBES[:3]]
LOGS = ROOT / "results/logs"

GROUPS = {
    "Early pretext tasks": "exemplar_cnn context_prediction colorization context_encoder jigsaw split_brain "
                           "rotnet video_colorization",
    "Contrastive": "instdisc moco simclr",
    "Self-distillation": "byol simsiam dino ibot",
    "Clustering and redundancy reduction": "swav barlow_twins vicreg",
    "Bags of visual words": "bownet obow",
    "Masked image modelling": "beit mae simmim",
    "Generative": "pixelcnn igpt",
    "Objects": "slot_attention dinosaur spot",                   # have no k-NN, and another table
    "With labels, the bound": "supervised"}

# From scratch these networks are those of others to the bit, with the same data: one run stands for all.
TWINS = {**dict.fromkeys("exemplar_cnn context_encoder moco simclr byol simsiam barlow_twins vicreg".split(),
                         "rotnet"), "obow": "bownet", "ibot": "dino"}


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@cache
def methods():
    """{name: (title, year, idea, lines)} of each method, by year; from the first line of its docstring."""
    rows = {}
    for file in (ROOT / "methods").glob("*.py"):
        text = file.read_text()
        first = re.match(r"(.+?) \((\d{4})\): (.+)\.\n", ast.get_docstring(ast.parse(text)))
        rows[file.stem] = first[1], int(first[2]), first[3], len(text.splitlines())
    return dict(sorted(rows.items(), key=lambda row: (row[1][1], row[1][0])))


def grouped():
    """(group, name) of each method that has one, by group and year; transfer.py has none."""
    return [(group, name) for group, names in GROUPS.items() for name in methods() if name in names.split()]


def grid(columns, rows):
    """The lines of a table, without the columns that no row fills."""
    kept = [i for i in range(len(columns)) if any(str(row[i]) for row in rows)]
    first, *lines = [f"| {' | '.join(str(row[i]) for i in kept)} |" for row in [columns, *rows]]
    return [first, "|---" * len(kept) + "|", *lines]


def mean(values, digits=1):
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if values[1:] else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def seeds_of(rows):
    return ", ".join(map(str, sorted({r["seed"] for r in rows})))


def with_plain(results):
    """The methods as they are, of toys.jsonl, with the seeds that the results have; then the results."""
    names, seeds = ({r[key] for r in results} for key in ("method", "seed"))
    plain = read(ROOT / "results/toys.jsonl")
    return [r for r in plain if r["method"] in names and r["seed"] in seeds] + results


def source(file, spread="mean ± standard deviation", base=False):
    """Below each table of runs: seeds, machines, where the lines are. base: so are those of toys.jsonl."""
    results, name, first = read(file), f"results/{file.name}", "results/toys.jsonl"
    seeds = seeds_of(results)
    spread = f", {spread}" if "," in seeds else " alone"
    machines = " and ".join(dict.fromkeys(r["machine"] for r in results))
    first = f"\nLines without flags: [{first}]({first})." * base
    return (f"Seeds: {seeds}{spread}. {machines}, torch {results[0]['torch']};\n"
            f"the command and the commit of each run are in [{name}]({name}).{first}")


def label_of(command, rows, file):
    """The command as a cell, with its seeds where they are not those of all the file."""
    seeds, whole = seeds_of(rows), seeds_of(read(file))
    return f"`{command}`" + (f" (seed{'s' * (',' in seeds)} {seeds})" if seeds != whole else "")


def by_layer(rows):
    """The linear probe of every layer, and before training; blank where they were not probed."""
    layers = [r["layers"] for r in rows if "layers" in r and "untrained" in r["layers"]["layer 1"]]
    now = {k: statistics.mean(x[k]["linear"] for x in layers) for k in (layers or [{}])[0]}
    before = {k: statistics.mean(x[k]["untrained"]["linear"] for x in layers) for k in now}
    return ", ".join(f"{now[k]:.0f} ({before[k]:.0f})" for k in now)


def probes(rows):
    """The cells of k-NN, linear, both before training, and by layer; blank for a method that has none."""
    if "knn" not in rows[0]:
        return [""] * len(PROBES)
    before = ", ".join(mean(r["untrained"][key] for r in rows) for key in ("knn", "linear"))
    return [*(mean(r[key] for r in rows) for key in ("knn", "linear")), before, by_layer(rows)]


def table(file):
    """The table of a results file, by group: mean and standard deviation over the seeds."""
    results, toys, spent = [r for r in read(file) if "knn" in r], file.stem == "toys", 0
    papers = json.loads((ROOT / "results/papers.json").read_text())
    few = tenth(ROOT / "results/variants-tenth.jsonl") if toys else {}
    columns = COLUMNS + ["10 % of labels (scratch)"] * bool(few) + ["in the paper, not here"] * toys
    lines, untimed = [], False
    if not results:
        return "Not measured yet."
    worlds = {}                                                  # k-NN of pixels: its linear, who has it
    for r in results:
        of = worlds.setdefault(f"{r['pixels']['knn']:.1f}", (f"linear {r['pixels']['linear']:.1f}", {}))
        of[1][r["method"]] = methods()[r["method"]][0]
    usual = max(worlds, key=lambda w: len(worlds[w][1]))
    for group, name in grouped():
        rows = [r for r in results if r["method"] == name]
        if not rows:
            continue
        if (title := [f"**{group}**", *[""] * (len(columns) - 1)]) not in lines:
            lines.append(title)
        title, *about = methods()[name]
        quiet = [r["seconds"] for r in rows if not r.get("busy")]
        spent, untimed = spent + statistics.mean(quiet or [0]) * len(rows), untimed or not quiet
        seconds = f"{statistics.mean(quiet):.0f}" if quiet else ""
        cells = [f"[{title}](methods/{name}.py){' †' * (name not in worlds[usual][1])}", *about, seconds]
        tuned = few[name][1] + f" ({few[name][2]})" if name in few else ""
        cells += probes(rows)[:3] + [tuned] * bool(few) + [paper(papers, name)] * toys
        lines.append(cells)
    lines = grid(columns, lines)
    others = [f"{', '.join(who.values())}: k-NN {knn}, {linear}" for knn, (linear, who) in worlds.items()
              if knn != usual]
    lines.append(f"\nPixels, reduced to 16 x 16: k-NN {usual}, {worlds[usual][0]}"
                 + (f"; of other images (†): {'; '.join(others)}" if others else "") + ".")
    lines.append("Seconds: blank where other runs were beside." if untimed else
                 f"By the seconds shown all seeds train for {spent / 60:.0f} minutes;\n"
                 "data, evaluation and pictures are not counted.")
    return "\n".join([*lines, source(file)])


def paper(papers, name):
    """The cell with the paper's own figure."""
    one = papers.get(name, dict(figure="", arxiv=""))
    return f"[{one['figure']}](https://arxiv.org/abs/{one['arxiv']})" if one["arxiv"] else one["figure"]


def tenth(file):
    """{method: [labels, fine-tuned, from scratch, frozen and probed]}, of those that have both runs."""
    rows, found = read(file), {}

    def of(name, scratch):
        start = f"--run runs/{name}-"
        return [r for r in rows if start in r["command"] and ("--scratch" in r["command"]) == scratch]
    for _, name in grouped():
        tuned, scratch = of(name, False), of(TWINS.get(name, name), True)
        if tuned and scratch:
            cells = [mean(r["accuracy"] for r in x) for x in (tuned, scratch)]
            found[name] = [f"{tuned[0]['labelled']:,}", *cells, mean(r["untrained"]["linear"] for r in tuned)]
    return found


def tenth_table(file):
    """What each method's encoder is worth with a tenth of the labels, beside the same from scratch."""
    lines = grid(["method", "labels", "fine-tuned, %", "from scratch, %", "frozen, linear, %"],
                 [[methods()[name][0], *cells] for name, cells in tenth(file).items()])
    return "\n".join([*lines, "", source(file)])


def layers_table(file):
    """The linear probe of each layer, before training in brackets, of the methods that probe them."""
    found = {name: by_layer([r for r in read(file) if r["method"] == name]) for _, name in grouped()}
    found = {name: layers.split(", ") for name, layers in found.items() if layers}
    most = max(map(len, found.values()), default=0)
    lines = grid(["layer", *range(1, most + 1)], [
        [methods()[name][0], *layers, *[""] * (most - len(layers))] for name, layers in found.items()])
    return "\n".join([*lines, "", source(file, "mean")])


def objects_table(file):
    """The scores of masks of scenes, a line for each kind of mask: kernels.segmentation.compare. Of variants
    those that were learned, and k-means, by command, first each method as it is."""
    variants, groups = file.stem.startswith("variants"), {}
    papers = json.loads((ROOT / "results/papers.json").read_text())
    rows = [r for r in read(file) if any(key.startswith("fg_ari, ") for key in r)]
    if variants:
        rows = with_plain(rows)
    for r in sorted(rows, key=lambda r: list(methods()).index(r["method"])):
        groups.setdefault(command_of(r) if variants else r["method"], []).append(r)
    scores = {key: label for key, label in dict(ari="ARI", fg_ari="FG-ARI", mbo="mBO", miou="mIoU").items()
              if all(any(k.startswith(f"{key}, ") for k in r) for r in rows)}    # older rows lack mIoU
    columns = ["command" if variants else "method", "masks of", *scores.values()]
    columns, lines = columns + ["lines", "seconds", "in the paper, not here"] * (not variants), []
    for key, rows in groups.items():
        quiet = [r["seconds"] for r in rows if not r.get("busy")]
        title, year, _, length = methods()[rows[0]["method"]]
        seconds = f"{statistics.mean(quiet):.0f}" if quiet else ""
        first = [label_of(key, rows, file)]
        if not variants:
            first = [f"[{title}](methods/{key}.py), {year}", length, seconds, paper(papers, key)]
        for who in (k.removeprefix("fg_ari, ") for k in rows[0] if k.startswith("fg_ari, ")):
            if not variants or who not in ("untrained", "blocks", "truth averaged"):
                cells = [mean((r[f"{key}, {who}"] for r in rows), 2) for key in scores]
                lines.append([first[0], who, *cells, *first[1:]])
                first = [""] * len(first)
    return "\n".join([*grid(columns, lines), "", source(file, base=variants)])


def command_of(row):
    """The command without its seed, in the names of run folders as well."""
    return re.sub(r"-seed\d+", "-seed0", re.sub(r" --seed \d+", "", row["command"]))


def curves_shown(folder):
    """The picture of the logs, and where they come from."""
    logs = [read(file)[0] for file in sorted(folder.glob("*.jsonl"))]
    if not logs or not (ROOT / "results/curves.png").exists():
        return "Not measured yet."
    machines = " and ".join(dict.fromkeys(log["machine"] for log in logs))
    return ("![Loss, its reference values, and k-NN over the steps of each method](results/curves.png)\n\n"
            f"Seed 0 alone. {machines}, torch {logs[0]['torch']};\nthe command and the commit of each run "
            "are in the first line of its log, `results/logs/<method>.jsonl`.")


def variants_table(file):
    """Commands side by side, with what the method itself measures. First each method as it is."""
    groups, results = {}, read(file)
    if not results:
        return "Not measured yet."
    for r in with_plain(results):
        groups.setdefault(command_of(r), []).append(r)
    own = {}                                                     # in a row: ..., untrained, own, loss, ...
    for one in (list(rows[0].items()) for rows in groups.values()):
        names = [k for k, _ in one]
        own |= {k: 0 for k, value in one[names.index("untrained") + 1:names.index("loss")]
                if isinstance(value, float)}
    own |= {k: 0 for k in ("z_std", "z_rank", "perplexity") if "collapse" in file.name}
    columns, lines = ["command", "loss", *(k.replace("_", " ") for k in own), *PROBES], []
    for command, rows in groups.items():
        cells = [label_of(command, rows, file), mean((r["loss"] for r in rows), 3)]
        for k in own:
            digits = next(d for d, above in ((1, 10), (2, 2), (3, -1)) if rows[0].get(k, 0) > above)
            cells.append(mean((r[k] for r in rows), digits) if k in rows[0] else "")
        lines.append(cells + probes(rows))
    base = any(command_of(r) == f"python methods/{r['method']}.py" for rows in groups.values() for r in rows)
    return "\n".join([*grid(columns, lines), "", source(file, base=base)])


def kernel_tables(path):
    """What bench.py measured last on each machine, GPUs first."""
    files = sorted(path.parent.glob(f"{path.name}-*.jsonl"), key=lambda f: (f.stem == "kernels-cpu", f.name))
    return "\n\n".join(map(kernel_table, files)) or "Not measured yet."


def kernel_table(file):
    """A line for each way to compute the same."""
    rows = list({(r["name"], r["shape"], r["way"]): r for r in read(file)}.values())
    columns = ["what", "shape", "how", "ms (20 to 80 %)", "x first", "of bound", "extra MiB", "images/s"]
    lines, first = [], {(r["name"], r["shape"]): r.get("ms") for r in rows[::-1]}
    for r in rows:
        ms = f"{r['ms']:.3g} ({r['low']:.3g} to {r['high']:.3g})" if "ms" in r else r["error"]
        bound = f"{r['percent']:.0f} % of {r['of']}" if "percent" in r else ""
        base = first[r["name"], r["shape"]]
        times = f"{r['ms'] / base:.3g}" if base and "ms" in r else ""
        cells = [r["name"], r["shape"], r["way"], ms, times, bound]
        cells += [str(r.get(key, "")) for key in ("extra_mib", "images_per_second")]
        lines.append(cells)
    name, one, lines = f"results/{file.name}", rows[-1], grid(columns, lines)
    lines.append(f"\n{one['machine']}, torch {one['torch']}, triton {one['triton']};")
    lines.append(f"the command and the commit of each line are in [{name}]({name}).")
    return "\n".join(lines)


def filled(page):
    """The page's text with the table of each results file, or another view of it, between its marks; links
    count from the page's folder."""
    views = dict(kernels=kernel_tables, variants=variants_table, logs=curves_shown, layers=layers_table,
                 objects=objects_table, tenth=tenth_table)

    def fill(m):
        how = views.get(re.split("[-.]", m[3].strip() if m[3] else m[2][8:])[0], table)
        text = re.sub(r"(?<=\]\()(?!http)[^)]+", lambda link: os.path.relpath(ROOT / link[0], page.parent),
                      how(ROOT / m[2]))
        return f"{m[1]}{text}\n{m[4]}"
    marks = r"(<!-- (results/[\w.=-]+)( layers| objects| tenth)? -->\n).*?(<!-- end -->)"
    return re.sub(marks, fill, page.read_text(), flags=re.S)


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
    """What has no line yet -> the commands that failed. The flags go to every method; the data among them
    names the file, or names[0]. The first seed has the machine for itself, so that its seconds count; then
    the others run side by side."""
    flags = [w for f in flags for w in (f.split("=", 1) if f.startswith(("--data=", "--seed=")) else [f])]
    data = flags[flags.index("--data") + 1] if "--data" in flags else "toys"
    place, _, first = names[0].rpartition(":")
    file = ROOT / "results" / ((place or re.sub(r"[^a-z0-9]+", "-", data.lower())) + ".jsonl")
    at = flags.index("--seed") if "--seed" in flags else len(flags)
    seeds, flags = flags[at + 1:at + 2] or ["0", "1", "2"], flags[:at] + flags[at + 2:]
    failed = []

    def run_seed(seed, threads=0):
        for name in (first, *names[1:]):
            command = [f"methods/{name}.py", "--seed", seed, *flags]
            line = " ".join(["python", *command])
            if not any((r["method"], r["seed"]) == (name, int(seed)) and (r["command"] == line or not place)
                       for r in read(file)):
                try:
                    run_one(command, file, (ROOT / "runs").glob(f"{name}-*-seed{seed}/result.json"), threads)
                except (subprocess.CalledProcessError, FileNotFoundError):       # the others go on
                    failed.append(line)

    run_seed(seeds[0])
    if others := seeds[1:]:
        with ThreadPoolExecutor(min(len(others), os.cpu_count())) as pool:
            list(pool.map(partial(run_seed, threads=max(1, os.cpu_count() // len(others))), others))
    return failed


def run_one(command, file, results, threads=0):
    """Run it; the newest of the `results` that it may have written becomes a line of `file`."""
    result, row = train(command, results, threads)
    if threads or os.getloadavg()[1] > os.cpu_count() + 1 or "OMP_NUM_THREADS" in os.environ:
        row["busy"] = True                                       # five minutes' load, or fewer threads
    with open(file, "a") as f:
        f.write(json.dumps(row) + "\n")
    if file.name == "toys.jsonl" and command[1:] == ["--seed", "0"]:
        keep_log(result, row)


def train(command, results, threads=0):
    """Run it -> the newest of `results`, and what is in it with the command, the commit and the machine.
    threads: of a process beside others; their bars would mix, so that what it prints comes at its end."""
    print(f"python {' '.join(command)}\n", end="", flush=True)            # whole, where two print at once
    began, about = time.time(), origin()                         # what runs, not what comes later
    beside = dict(env=os.environ | dict(OMP_NUM_THREADS=str(threads)), stdout=subprocess.PIPE,
                  stderr=subprocess.STDOUT, text=True) if threads else {}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False, **beside)
    print(done.stdout or "", end="", flush=True)
    done.check_returncode()
    written = [f for f in results if f.stat().st_mtime > began - 2]
    if not written:
        raise FileNotFoundError(f"{' '.join(command)} has left no result where it was looked for")
    result = max(written, key=lambda f: f.stat().st_mtime)
    return result, json.loads(result.read_text()) | dict(command=" ".join(["python", *command]), **about)


def keep_log(result, row):
    """results/logs/<method>.jsonl: where it comes from and what the loss is read against, then the log."""
    def short(values):
        return {k: v if k == "step" else float(f"{v:.4g}") for k, v in values.items() if k != "seconds"}

    first = {k: row[k] for k in ("command", "commit", "machine", "torch")}
    lines = [first | dict(reference=short(row["reference"])), *map(short, read(result.parent / "log.jsonl"))]
    LOGS.mkdir(exist_ok=True)
    (LOGS / f"{row['method']}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def logs():
    """Seed 0 of each method that has no log -> the commands that failed. Results files stay as they are."""
    failed = []
    for name in (name for _, name in grouped() if not (LOGS / f"{name}.jsonl").exists()):
        try:
            keep_log(*train([f"methods/{name}.py", "--seed", "0"],
                            (ROOT / "runs").glob(f"{name}-*-seed0/result.json")))
        except Exception as error:                               # the others go on
            print(f"{name} failed: {error}", flush=True)
            failed.append(f"python methods/{name}.py --seed 0")
    return failed


if __name__ == "__main__":
    what, failed = sys.argv[1:2], []
    if what in (["logs"], ["curves"], ["pictures"]):
        import pictures
        failed = logs() if what == ["logs"] else []
        if what == ["pictures"]:
            pictures.pictures()
        pictures.curves()
    elif what:
        names = [name for _, name in grouped()] if what == ["all"] else what[0].split(",")
        failed = run_all(names, sys.argv[2:])
    for page in PAGES:
        page.write_text(filled(page))
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))
