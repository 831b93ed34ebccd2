"""README, results/README and run.sh: what they show can be pasted, and every number has a run behind it."""
import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
from kernels.views import normalise

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "methods"), str(ROOT / "results")]
table, pictures = map(importlib.import_module, ("table", "pictures"))
README = "\n".join(page.read_text() for page in table.PAGES)
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```\n(.*?)```", README, re.S)
            for line in block.splitlines() if re.match(r"(python|torchrun|\./run\.sh)\b", line)]
COMMANDS += sorted(set(re.findall(r"`(python\s[^`]+|\./run\.sh [^`]+)`", README)))
FILES = sorted(f for f in (ROOT / "results").glob("*.jsonl") if not f.name.startswith("kernels-"))
ROWS = [dict(json.loads(line), file=file.stem) for file in FILES for line in file.read_text().splitlines()]


def check(words):
    """A method's file exists and takes the flags."""
    file = ROOT / words[0]
    assert file.is_file(), file
    module = importlib.import_module(file.stem)
    common.parse(module.Config, module.PAPER, words[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_pasted(command):
    words = shlex.split(command)
    if words[:2] in (["python", "results/table.py"], ["python", "results/lessons.py"]):
        assert f"python {words[1]} {words[2]}" in (ROOT / words[1]).read_text()
    elif words[0] == "python":
        check(words[1:])
    elif words[0] == "torchrun":
        check(words[3:])
    elif words[1:] and words[1] not in ("test", "all", "table", "bench"):
        check([f"methods/{words[1]}.py", *words[2:]])


@pytest.mark.parametrize("name, options", [("simclr", ""), ("mae", ', pool="mean"')])
def test_what_a_run_has_learned_can_be_used_as_shown(name, options, tmp_path):
    """MAE's as said below the example: another encoder, the mean of its patches."""
    module = importlib.import_module(name)
    encoder = module.build(cfg := module.Config()).encoder.eval()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    code = re.search(r"```\n(from kernels.encoders import .*?)```", README, re.S)[1]
    for old, new in (("runs/simclr-toys-seed0", str(tmp_path)), ("resnet_small", cfg.encoder),
                     ("image_size=32", f"image_size=32{options}")):
        assert old in code
        code = code.replace(old, new)
    exec(code, known := dict(images=images))
    assert known["h"].shape == (2, 128) and torch.equal(known["h"], encoder(normalise(images)))
    assert f'create_encoder("{cfg.encoder}", image_size=32{options})' in " ".join(README.split())


def test_the_output_shown_first_is_that_of_the_committed_run():
    """As Run.finish prints it, of MAE with seed 0."""
    row, = (r for r in ROWS if (r["file"], r["method"], r["seed"]) == ("toys", "mae", 0))
    shown = {"pixels, 16 x 16": row["pixels"], "untrained encoder": row["untrained"], "mae": row}
    lines = [f"{name:27}{one['knn']:12.1f} {one['linear']:13.1f}" for name, one in shown.items()]
    ends = f"{row['steps']} steps in {row['seconds']:.0f} s; result, encoder, pictures: runs/mae-toys-seed0"
    assert "\n".join([*lines, "", ends, "```"]) in README


def sections(page):
    """The names that links give the page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_there_are_commands_and_links_lead_somewhere():
    assert len(COMMANDS) >= 8
    for page in table.PAGES:
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            to, _, section = link.partition("#")
            file = page.parent / to if to else page
            assert file.exists(), link
            assert not section or section in sections(file), link
    for file in re.findall(r"`((?:methods|kernels|tests|results)/[\w/]+\.py)`", README):
        assert (ROOT / file).exists(), file


def test_tables_are_generated_from_the_committed_results():
    assert all(table.filled(page) == page.read_text() for page in table.PAGES)
    assert "<!-- results/kernels -->" in README                  # of each kernels-*.jsonl
    files = [file.name for file in FILES]
    marks = re.findall(r"<!-- results/(\S+\.jsonl|variants-\S+\.jsonl (?:objects|tenth)) -->", README)
    assert sorted(mark.partition(" ")[0] for mark in marks) == files


def test_every_method_has_a_group_a_picture_and_runs():
    """transfer.py alone has none: it fine-tunes the others."""
    files = {file.stem for file in (ROOT / "methods").glob("*.py")} - {"transfer"}
    groups = dict((name, group) for group, name in table.grouped())
    assert groups.keys() == files and len(table.grouped()) == len(files) and files <= pictures.PICTURES.keys()
    objects = {name for name in files if groups[name] == "Objects"}        # have another table, and no k-NN
    for name in files - objects:
        rows = [r for r in ROWS if (r["file"], r["method"]) == ("toys", name)]
        now, before = (sum(r["linear"] for r in x) for x in (rows, [r["untrained"] for r in rows]))
        assert rows and now > before and all("knn" in r for r in rows), name


@pytest.mark.parametrize("name", [name for _, name in table.grouped()])
def test_a_docstrings_run_says_what_the_rows_say(name):
    """Mean and deviation, before training, the least that a seed gains, and the seconds."""
    text = (ROOT / f"methods/{name}.py").read_text()
    text = " ".join(re.search(r"\nRun .*?\nDiffers", text, re.S)[0].split())
    rows, found = [r for r in ROWS if (r["file"], r["method"]) == ("toys", name)], 0
    who = "A_DEC, student" if name == "spot" else "masks"
    keys = {"linear": "linear", "k-NN": "knn"}
    keys |= {metric: f"{metric.lower().replace('-', '_')}, {who}" for metric in ("mBO", "ARI", "FG-ARI")}
    for label, key in keys.items():
        now, m = [r.get(key) for r in rows], re.search(rf"(?<![\w-]){label}:? ([\d.]+) ± ([\d.]+)", text)
        if m and None not in now:
            found, digits = found + 1, 1 if label in ("linear", "k-NN") else 2
            told = [float(x) for x in m.groups()]
            assert told == [round(f(now), digits) for f in (statistics.mean, statistics.stdev)]
        if m and "linear" in rows[0]:
            more = re.match(r"(?: %)? \((?:untrained )?([\d.]+)(?:; each (?:seed )?at least \+(\d+))?",
                            text[m.end():])
            before = [r["untrained"][key] for r in rows]
            gained = int(min(a - b for a, b in zip(now, before, strict=True)))
            assert more[1] == f"{statistics.mean(before):.1f}" and int(more[2] or gained) == gained
    quiet, told = [r["seconds"] for r in rows if not r.get("busy")], re.search(r"(\d+) s on 2 cores", text)
    assert found >= 2 and bool(quiet) == bool(told)
    assert not told or told[1] == f"{statistics.mean(quiet):.0f}"


def test_the_figures_of_the_papers_say_where_they_were_read():
    for name, one in json.loads((ROOT / "results/papers.json").read_text()).items():
        assert one["figure"] and one["read"] and re.fullmatch(r"(\d{4}\.\d{4,5})?", one["arxiv"]), name
        assert one["arxiv"] in (ROOT / f"methods/{name}.py").read_text()


def test_a_picture_is_parted_into_its_rows(tmp_path):
    x = torch.zeros(3, 3, 32, 32)
    common.save_grid(tmp_path / "a.png", {"one": x, "two": x, "three": x}, "a title")
    assert len(pictures.rows_of(Image.open(tmp_path / "a.png").convert("RGB"))) == 3
    for name, rows in pictures.ROWS.items():
        found = pictures.rows_of(Image.open(ROOT / f"results/{name}.png").convert("RGB"))
        assert max(rows) < len(found), name


def test_a_log_is_kept_short_and_one_failure_stops_no_other(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"step": 12345, "loss": 1.23456, "seconds": 3.0, "knn": 51.0}\n')
    row = dict(method="mae", command="c", commit="d", machine="m", torch="t", reference={"ln 4": 1.38629})

    def train(command, results):
        if "methods/rotnet.py" in command:
            raise subprocess.CalledProcessError(1, command)
        return tmp_path / "result.json", row | dict(method=Path(command[0]).stem)

    monkeypatch.setattr(table, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(table, "train", train)
    assert table.logs() == table.logs() == ["python methods/rotnet.py --seed 0"]
    assert {f.stem for f in table.LOGS.iterdir()} == {name for _, name in table.grouped()} - {"rotnet"}
    first, line = table.read(table.LOGS / "mae.jsonl")
    assert first["reference"] == {"ln 4": 1.386} and line == {"step": 12345, "loss": 1.235, "knn": 51.0}


def test_methods_without_probes_leave_the_tables_whole(tmp_path):
    row = dict(method="slots", command="c", seed=0, machine="m", torch="t", untrained={}, fg_ari=.5, loss=1.)
    file = tmp_path / "variants-objects.jsonl"
    file.write_text(json.dumps(row))
    assert table.table(file) == "Not measured yet." and "| 0.500 |" in table.variants_table(file)


def test_a_line_of_other_seeds_says_so(tmp_path):
    """Beside three seeds of the file, and of the first table: of one, of two."""
    file = tmp_path / "variants-some.jsonl"
    row = dict(method="mae", machine="m", torch="t", untrained={}, loss=1.)
    rows = [row | dict(seed=seed, command=f"python methods/mae.py --seed {seed} --clip {n}")
            for n in (1, 2, 3) for seed in range(n)]
    file.write_text("\n".join(map(json.dumps, rows)))
    *_, one, two, three, _, seeds, _, first = table.variants_table(file).splitlines()
    assert one.startswith("| `python methods/mae.py --clip 1` (seed 0) | 1.000 |")
    assert two.startswith("| `python methods/mae.py --clip 2` (seeds 0, 1) | 1.000 ± 0.000 |")
    assert three.startswith("| `python methods/mae.py --clip 3` | 1.000 ± 0.000 |")
    assert seeds.startswith("Seeds: 0, 1, 2, mean ± standard deviation. m, torch t;")
    assert first == "Lines without flags: [results/toys.jsonl](results/toys.jsonl)."


def test_masks_of_variants_are_shown_by_command_without_the_seed(tmp_path):
    """First the methods as they are, with the same seeds; a line for each kind of masks that were learned."""
    row = {f"{metric}, {who}": .25 for metric in ("ari", "fg_ari", "mbo") for who in ("masks", "blocks")}
    row |= dict(method="slot_attention", machine="m", torch="t", busy=True)
    file = tmp_path / "variants-some.jsonl"
    command = "python methods/slot_attention.py --k 5 --weights runs/dino-seed{0}/encoder.pt --seed {0}"
    file.write_text("\n".join(json.dumps(row | dict(command=command.format(i), seed=i)) for i in (0, 1)))
    lines = table.objects_table(file).splitlines()[2:]
    rows = table.read(table.ROOT / "results/toys.jsonl")
    ari = [r["ari, masks"] for r in rows if r["method"] == "slot_attention" and r["seed"] < 2]     # as here
    assert lines[0].startswith(f"| `python methods/slot_attention.py` | masks | {sum(ari) / len(ari):.2f} ")
    assert lines[2] == f"| `{command.format(0)[:-9]}` | masks | 0.25 ± 0.00 | 0.25 ± 0.00 | 0.25 ± 0.00 |"
    assert not lines[3]


@pytest.mark.parametrize("file", sorted(table.LOGS.glob("*.jsonl")), ids=lambda f: f.stem)
def test_a_log_says_where_it_comes_from(file):
    first, *lines = table.read(file)
    assert first["command"] == f"python methods/{file.stem}.py --seed 0" and first["reference"] and lines
    assert re.fullmatch(r"[0-9a-f]{7,40}", first["commit"]) and first["machine"] and first["torch"]


def test_a_rows_commit_is_that_of_its_start_and_no_older_result_is_taken(tmp_path, monkeypatch):
    file, about = tmp_path / "result.json", dict(commit="before", machine="m")
    file.write_text('{"linear": 1}')
    os.utime(file, (0, 0))
    monkeypatch.setattr(table, "origin", lambda: dict(about))
    monkeypatch.setattr(table.subprocess, "run", lambda *args, **_: subprocess.CompletedProcess(args, 0))
    with pytest.raises(FileNotFoundError, match="methods/x.py has left no result"):
        table.train(["methods/x.py"], [file])

    def run(*args, **options):
        about["commit"] = "after"
        file.write_text('{"linear": 2}')
        return subprocess.CompletedProcess(args, 0)
    monkeypatch.setattr(table.subprocess, "run", run)
    assert table.train(["methods/x.py"], [file])[1] == dict(linear=2, command="python methods/x.py",
                                                            commit="before", machine="m")


def test_the_first_seed_runs_alone_then_the_others_side_by_side(tmp_path, monkeypatch):
    """What has a line is not run again; a run beside another has fewer threads, and no seconds to show."""
    beside, ran = threading.Barrier(2, timeout=30), []           # breaks where one waits alone

    def train(command, results, threads):
        ran.append((seed := int(command[2]), command[0]))
        if seed:
            beside.wait()
        return "result.json", dict(method=Path(command[0]).stem, seed=seed, command="", threads=threads)

    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "train", train)
    monkeypatch.setattr(table, "keep_log", lambda result, row: None)
    monkeypatch.setattr(table.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(table.os, "getloadavg", lambda: (0., 0., 0.))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "results").mkdir()
    file = tmp_path / "results/toys.jsonl"
    done = [dict(method="rotnet", seed=seed, command="") for seed in (0, 1, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in done))
    table.run_all(["mae", "rotnet", "simclr"], [])
    names = "methods/mae.py", "methods/simclr.py"
    assert ran[:2] == [(0, name) for name in names]
    assert sorted(ran[2:]) == [(seed, name) for seed in (1, 2) for name in names]
    rows = table.read(file)[3:]
    assert [r["threads"] for r in rows] == [0, 0, 3, 3, 3, 3]
    assert [r.get("busy") for r in rows] == [None, None, True, True, True, True]


@pytest.mark.parametrize("flags, file, seeds", [
    ("--data=cifar10", "cifar10", [0, 1, 2]), ("--data cifar10 --seed=1", "cifar10", [1]),
    ("--seed=2", "toys", [2])])
def test_flags_with_an_equals_sign_are_read_too(flags, file, seeds, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "run_one", lambda command, file, *_: ran.append((file.stem, command[1:3])))
    assert table.run_all(["mae"], flags.split()) == []
    assert sorted(ran) == [(file, ["--seed", str(seed)]) for seed in seeds]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    ran = []
    def run_one(command, file, results, threads):
        ran.append(command)
        if "methods/mae.py" in command:
            raise subprocess.CalledProcessError(1, command)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "run_one", run_one)
    failed = table.run_all(["mae", "rotnet"], [])
    assert len(ran) == 6 and sorted(failed) == [f"python methods/mae.py --seed {seed}" for seed in (0, 1, 2)]


def test_a_run_beside_others_prints_at_its_end_and_its_failure_stops(tmp_path, monkeypatch, capsys):
    (tmp_path / "methods").mkdir()
    code = "import os, sys\nprint(os.environ['OMP_NUM_THREADS'])\nsys.exit('no')"
    (tmp_path / "methods/x.py").write_text(code)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        table.train(["methods/x.py"], [], threads=3)
    assert capsys.readouterr().out == "python methods/x.py\n3\nno\n"


def test_results_stay_small():
    assert sum(f.stat().st_size for f in (ROOT / "results").rglob("*") if f.is_file()) < 15e6


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['method']}-{r['data']}-{r['seed']}")
def test_every_row_has_a_command_a_commit_and_a_machine(row):
    words = shlex.split(row["command"])
    assert words[:2] == ["python", f"methods/{row['method']}.py"] and str(row["seed"]) in words
    check(words[1:])
    assert re.fullmatch(r"[0-9a-f]{7,40}", row["commit"]) and row["machine"] and row["torch"]


@pytest.mark.parametrize("row", [r for r in ROWS if not r["file"].startswith("variants-")],
                         ids=lambda r: f"{r['method']}-{r['data']}-{r['seed']}")
def test_every_run_beats_its_own_untrained_encoder(row):
    """Variants are there to show what fails, too. Methods of objects have masks, and no linear probe: better
    than blocks, and objects told apart better than by k-means of the features where these are given."""
    if "linear" in row:
        assert row["linear"] > row["untrained"]["linear"]
    else:
        who = "A_DEC, student" if row["method"] == "spot" else "masks"
        for metric in ("ari", "mbo", "fg_ari"):
            assert row[f"{metric}, {who}"] > max(row[f"{metric}, untrained"], row[f"{metric}, blocks"])
        assert row[f"fg_ari, {who}"] > row.get("fg_ari, k-means", 0)


def test_the_means_below_untrained_are_those_that_the_readme_names():
    """By k-NN; by the linear probe no run is (above). Under "What did not work"."""
    rows, below = [r for r in ROWS if not r["file"].startswith("variants-") and "knn" in r], set()
    for file, name in {(r["file"], r["method"]) for r in rows}:
        pairs = [(r["knn"], r["untrained"]["knn"]) for r in rows if (r["file"], r["method"]) == (file, name)]
        if statistics.mean(a - b for a, b in pairs) < 0:
            below.add((file, name))
    assert below == {("toys", "pixelcnn"), ("toys", "split_brain"), ("toys", "video_colorization"),
                     ("cifar10", "context_encoder")}
    told = " ".join(re.search(r"## What did not work(.*?)\n## ", README, re.S)[1].split()).lower()
    assert all(table.methods()[name][0].lower() in told for _, name in below)


@pytest.mark.parametrize("name", [name for _, name in table.grouped()])
def test_a_loss_ends_below_what_can_be_had_without_looking(name):
    """The mean of the log's last five, below each reference that is no goal: ln K, a histogram, the mean."""
    first, *log = table.read(table.LOGS / f"{name}.jsonl")
    loss = statistics.mean(line["loss"] for line in log[-5:])
    reference = {k: v for k, v in first["reference"].items() if k not in ("perfect", "equal or constant")}
    assert reference and all(loss < v - .01 * max(abs(v), 1) for v in reference.values())


def test_run_sh_names_the_python_that_it_needs(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.18 && exit 0\nexit 1\n')
    old.chmod(0o755)
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}")
    run = subprocess.run([ROOT / "run.sh", "mae"], env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == "run.sh: Python 3.9.18 is too old: install Python 3.11 or newer first\n"


def test_run_sh_trains_and_names_what_there_is(tmp_path):
    flags = ["--data", "toys:n=200", "--batch_size", "16", "--steps", "2", "--out", str(tmp_path)]
    run = subprocess.run([ROOT / "run.sh", "mae", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "untrained encoder" in run.stdout and "linear" in run.stdout
    folder = tmp_path / "mae-toys-n=200-seed0"
    assert {f.name for f in folder.iterdir()} == {"result.json", "log.jsonl", "encoder.pt", "checkpoint.pt",
                                                   "curves.png", "reconstructions.png"}
    wrong = subprocess.run([ROOT / "run.sh", "simclrr"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "simclr" in wrong.stdout and "mae" in wrong.stdout
