"""README and run.sh: what they show can be pasted, and every number has a run behind it."""
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```\n(.*?)```", README, re.S)
            for line in block.splitlines() if re.match(r"(python|torchrun|\./run\.sh)\b", line)]
FILES = sorted(f for f in (ROOT / "results").glob("*.jsonl") if not f.name.startswith("kernels-"))
ROWS = [dict(json.loads(line), file=file.stem) for file in FILES for line in file.read_text().splitlines()]
sys.path[:0] = [str(ROOT / "methods"), str(ROOT / "results")]


def check(words):
    """A method's file exists and takes the flags."""
    file = ROOT / words[0]
    assert file.is_file(), file
    module = importlib.import_module(file.stem)
    common.parse(module.Config, module.PAPER, words[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_pasted(command):
    words = shlex.split(command)
    if words[0] == "python":
        check(words[1:])
    elif words[0] == "torchrun":
        check(words[3:])
    elif words[1:] and words[1] not in ("test", "all", "bench"):
        check([f"methods/{words[1]}.py", *words[2:]])


def test_there_are_commands_and_links_lead_somewhere():
    assert len(COMMANDS) >= 8
    for link in re.findall(r"\]\((?!http)([^)#]+)\)|`((?:methods|kernels|tests)/[\w/]+\.py)`", README):
        assert (ROOT / (link[0] or link[1])).exists(), link


def test_tables_are_generated_from_the_committed_results():
    table = importlib.import_module("table")
    assert table.readme(README) == README
    files = sorted(file.name for file in (ROOT / "results").glob("*.jsonl"))
    assert sorted(re.findall(r"<!-- results/(\S+) -->", README)) == files


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['method']}-{r['data']}-{r['seed']}")
def test_every_row_has_a_command_a_commit_and_a_machine(row):
    words = shlex.split(row["command"])
    assert words[:2] == ["python", f"methods/{row['method']}.py"] and str(row["seed"]) in words
    check(words[1:])
    assert re.fullmatch(r"[0-9a-f]{7,40}", row["commit"]) and row["machine"] and row["torch"]


@pytest.mark.parametrize("row", [r for r in ROWS if not r["file"].startswith("variants-")],
                         ids=lambda r: f"{r['method']}-{r['data']}-{r['seed']}")
def test_every_run_beats_its_own_untrained_encoder(row):
    """Variants are there to show what fails, too."""
    assert row["linear"] > row["untrained"]["linear"]


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
