"""What a run leaves behind when it is killed, stopped, resumed, or started with a beginner's mistake."""
import errno
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

import common
from kernels.views import normalise

ROOT = Path(__file__).parents[1]
FLAGS = "--data toys:n=300 --image_size 16 --batch_size 32 --device cpu".split()
NAME = "simclr-toys-n=300-seed0"
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.fixture(autouse=True)
def as_before():
    """The signal handlers of a stopped run are taken away."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def go(out, *flags, method="simclr"):
    """A short run in this process -> its result."""
    module = import_module(f"methods.{method}")
    argv = [*FLAGS, "--steps", "4", "--save_every", "2", "--out", str(out), *flags]
    return module.main(common.parse(module.Config, module.PAPER, argv))


def stops(*args, **options):
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as e:
        go(*args, **options)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code, e.value.code
    return e.value.code


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read(file):
    return torch.load(file, weights_only=True)


def same(a, b):
    """Bit for bit, through dictionaries and lists."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# ---- whole processes

def start(out, *flags):
    """As a user does, from another folder."""
    command = [sys.executable, ROOT / "methods" / "simclr.py", *FLAGS, "--out", out, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=out.parent, env=ENV, **pipes)


def wait_for(process, step, folder):
    """Until that step is logged and a checkpoint exists."""
    for _ in range(6000):
        assert process.poll() is None, process.communicate()
        text = (folder / "log.jsonl").read_text() if (folder / "log.jsonl").exists() else ""
        if f'{{"step": {step},' in text and (folder / "checkpoint.pt").exists():
            return
        time.sleep(.01)
    raise AssertionError("no progress")


def test_a_run_that_is_killed_and_stopped_gives_the_bits_of_an_unbroken_one(tmp_path):
    """SIGKILL, then SIGTERM, then SIGINT, each followed by --resume, over three epochs."""
    steps = "--steps 24 --save_every 2".split()
    whole = start(tmp_path / "whole", *steps)
    folder = tmp_path / "broken" / NAME
    process = start(tmp_path / "broken", *steps)
    wait_for(process, 4, folder)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    for number, code in (signal.SIGTERM, 143), (signal.SIGINT, 130):
        kept = read(folder / "checkpoint.pt")["step"]
        process = start(tmp_path / "broken", *steps, "--resume")
        wait_for(process, kept + 1, folder)
        process.send_signal(number)
        out, err = process.communicate()
        step = read(folder / "checkpoint.pt")["step"]
        assert process.returncode == code and kept < step < 24 and "Traceback" not in out + err
        assert f"stopped after step {step}: add --resume" in out and f"resumed at step {kept}" in out
        assert [line["step"] for line in log(folder)] == list(range(step))
    process = start(tmp_path / "broken", *steps, "--resume")
    out, err = process.communicate()
    assert process.returncode == 0, err
    out, err = whole.communicate()
    assert whole.returncode == 0 and "Traceback" not in err, err
    unbroken = tmp_path / "whole" / NAME
    assert same(read(folder / "encoder.pt"), read(unbroken / "encoder.pt"))
    for part in ("step", "model", "optimizers"):
        assert same(read(folder / "checkpoint.pt")[part], read(unbroken / "checkpoint.pt")[part]), part
    assert log(folder) == log(unbroken) and [line["step"] for line in log(folder)] == list(range(24))


def test_a_mistake_is_one_line_on_stderr(tmp_path):
    process = start(tmp_path / "runs", "--data", "nowhere")
    out, err = process.communicate()
    assert process.returncode == 1 and len(err.splitlines()) == 1
    assert err.startswith("simclr.py: --data nowhere is unknown: give toys,")


# ---- in this process

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of four steps, and what finish() returned."""
    out = tmp_path_factory.mktemp("finished")
    result = go(out)
    return out / NAME, result


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The folder of a run of four steps that was stopped after the second."""
    out, before = tmp_path_factory.mktemp("unfinished"), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        stop = lambda run, *_, **__: run.step == 1 and signal.raise_signal(signal.SIGTERM)  # noqa: E731
        patch.setattr(common.Run, "log", stop)
        with pytest.raises(SystemExit) as e:
            go(out)
    signal.signal(signal.SIGTERM, before)
    assert e.value.code == 143 and read(out / NAME / "checkpoint.pt")["step"] == 2
    return out / NAME


@pytest.fixture
def folder(unfinished, tmp_path):
    """A copy of it, in tmp_path."""
    return Path(shutil.copytree(unfinished, tmp_path / NAME))


def test_a_finished_run_has_all_that_the_readme_promises(finished):
    folder, result = finished
    assert {f.name for f in folder.iterdir()} == {"checkpoint.pt", "curves.png", "encoder.pt", "log.jsonl",
                                                  "neighbours.png", "result.json", "views.png"}
    assert json.loads((folder / "result.json").read_text()) == result
    assert {"method", "data", "seed", "knn", "linear", "pixels", "untrained", "loss", "h_std", "h_rank",
            "z_std", "z_rank", "reference", "steps", "seconds", "images_per_second", "parameters",
            "flags", "device", "python", "torch"} <= result.keys()
    assert (result["method"], result["data"], result["steps"]) == ("simclr", "toys:n=300", 4)
    assert result["flags"]["batch_size"] == 32 and "lr" not in result["flags"]
    for row in (result, result["pixels"], result["untrained"]):
        assert 0 <= row["knn"] <= 100 and 0 <= row["linear"] <= 100
    lines = log(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and all(line["loss"] > 0 for line in lines)
    assert lines[-1]["loss"] == pytest.approx(result["loss"], abs=1e-4)
    assert lines[-1]["knn"] == result["knn"]                     # of all images, for there are few
    assert result["parameters"] == sum(v.numel() for k, v in read(folder / "encoder.pt").items()
                                       if "running" not in k and "num_batches" not in k)


def test_pixels_are_those_of_the_images_and_the_curve_is_of_what_learns(tmp_path):
    """Of 16 x 16 pixels nothing is lost. The first k-NN in the log is after a step, which changes it."""
    result = go(tmp_path, "--image_size", "16", "--lr", ".1")
    data = common.load_data(common.Config(data="toys:n=300", image_size=16))
    images = (normalise(x).flatten(1) for x in (data.images, data.test_images))
    assert result["pixels"] == common.probe(*images, data)
    assert log(tmp_path / NAME)[-1]["knn"] == result["knn"] != result["untrained"]["knn"]


def test_layers_are_probed_before_and_after_training(tmp_path, capsys):
    """Four steps change the layers, but not those of the copy from before, whatever the rate."""
    one, other = (go(tmp_path / lr, "--lr", lr, method="rotnet")["layers"] for lr in ("1e-3", "3e-3"))
    assert list(one) == ["layer 1", "layer 2", "layer 3"]
    assert [r["untrained"] for r in one.values()] == [r["untrained"] for r in other.values()]
    assert any(one[k]["knn"] != other[k]["knn"] or one[k]["linear"] != other[k]["linear"] for k in one)
    row, printed = one["layer 2"], capsys.readouterr().out
    assert re.search(rf"layer 2, 2 x 2 cells +{row['knn']:.1f} +{row['linear']:.1f} +untrained "
                     rf"{row['untrained']['knn']:.1f} {row['untrained']['linear']:.1f}", printed)


def test_who_forgets_resume_loses_nothing(folder, tmp_path):
    before = contents(folder)
    go(tmp_path, "--steps", "1")
    assert (folder / "previous.pt").read_bytes() == before["checkpoint.pt"]
    assert read(folder / "checkpoint.pt")["step"] == 1 and [line["step"] for line in log(folder)] == [0]
    go(tmp_path, "--steps", "1")                            # and again: the first is not written over
    assert (folder / "previous.pt").read_bytes() == before["checkpoint.pt"]
    assert read(folder / "previous1.pt")["step"] == 1


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(folder, tmp_path, monkeypatch):
    """A gradient can be infinite where the loss is not."""
    before = contents(folder)

    def spoil(self, loss, **parts):
        next(self.method.parameters()).data.fill_(math.nan if self.step == 3 else 0.)
    monkeypatch.setattr(common.Run, "log", spoil)
    assert "the weights are not finite after step 3: lower --lr" in stops(tmp_path, "--resume")
    assert contents(folder)["checkpoint.pt"] == before["checkpoint.pt"]


def test_the_evaluation_draws_the_same_in_a_run_that_is_resumed_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "finish", lambda self, **extra: torch.rand(3).tolist())
    monkeypatch.setattr(common, "save_neighbours", lambda *args: None)
    assert go(tmp_path) == go(tmp_path, "--resume")


def test_a_signal_that_comes_while_processes_exchange_theirs_is_not_lost(tmp_path, monkeypatch):
    """Two processes, of which the other is a stub: the signal is sent in step 1, and acted on in step 2."""
    flags = []

    def all_reduce(flag, op):
        flags.append(int(flag))
        if len(flags) == 2:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common, "distribute", lambda method: method)
    monkeypatch.setattr(common.dist, "barrier", lambda: None)
    monkeypatch.setattr(common.dist, "all_reduce", all_reduce)
    with pytest.raises(SystemExit) as e:
        go(tmp_path, "--steps", "6", method="rotnet")
    assert flags == [0, 0, 15] and e.value.code == 128 + 15



def test_resume_of_a_finished_run_changes_no_result(finished, tmp_path):
    folder = Path(shutil.copytree(finished[0], tmp_path / NAME))
    result = go(tmp_path, "--resume")
    assert result | dict(flags=0) == finished[1] | dict(flags=0)
    assert contents(folder)["log.jsonl"] == contents(finished[0])["log.jsonl"]


def test_resume_after_a_log_line_was_cut(folder, tmp_path):
    """As a full disk or a power cut leaves it."""
    (folder / "log.jsonl").write_text('{"step": 0, "loss": 4.1, "seconds": 0.0}\n{"step": 1, "lo')
    go(tmp_path, "--resume")
    assert [line["step"] for line in log(folder)] == [0, 2, 3]


@pytest.mark.parametrize("flags, why", [
    ("--data nowhere", "--data nowhere is unknown"),
    ("--data folder:/nonexistent", "no images in /nonexistent"),
    ("--encoder resnt18", "did you mean resnet18?"),
    ("--optimizer foo", "give adamw, sgd or lars"),
    ("--precision fp16", "give auto, fp32 or bf16"),
    ("--device gpu", "--device gpu is not here: this machine has "),
    ("--device cuda:99", "--device cuda:99 is not here"),
    ("--weights missing.pt", "cannot read missing.pt (No such file"),
    ("--weights .", "cannot read . (Is a directory"),
    ("--batch_size 301", "--batch_size 301 is more than the 300 training images"),
    ("--resume", "nothing to resume in")])
def test_a_mistake_is_one_line_and_loses_nothing(flags, why, folder, tmp_path):
    before = contents(folder)
    out = tmp_path / "other" if "--resume" in flags else tmp_path
    assert why in stops(out, *flags.split())
    after = contents(folder)
    assert all(raw in after.values() for raw in before.values() if raw[:1] != b"{")  # the old log may go


def test_one_image_is_too_few_for_batchnorm_alone(tmp_path):
    assert "--batch_size 1 does not fit: BatchNorm" in stops(tmp_path, "--batch_size", "1", method="byol")
    assert go(tmp_path, "--batch_size", "1", "--encoder", "vit_micro", method="mae")["steps"] == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here(tmp_path):
    assert "--device cuda is not here: this machine has" in stops(tmp_path, "--device", "cuda")


def test_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert "choose another place with --out" in stops(out)
    (tmp_path / "out" / NAME / "log.jsonl").mkdir(parents=True)
    assert "cannot write" in stops(tmp_path / "out")
    assert (tmp_path / "file").read_text() == "mine"


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def spoil(folder, how):
    """Put a bad checkpoint into the folder."""
    file = folder / "checkpoint.pt"
    state = read(file)
    if how == "bomb":
        torch.save(state | dict(bomb=Bomb(folder / "boom")), file)
    elif how == "pickle":
        file.write_bytes(pickle.dumps(Bomb(folder / "boom")))
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "list":
        torch.save([1, 2], file)
    elif how == "renamed":
        state["model"]["new"] = state["model"].pop("encoder.conv1.weight")
        torch.save(state, file)
    elif how == "no seconds":
        torch.save({k: v for k, v in state.items() if k != "seconds"}, file)
    elif how == "no names":
        torch.save(state | dict(config=[1], model=[1]), file)
    elif how == "other images":
        state["config"]["images"] += 1
        torch.save(state, file)


@pytest.mark.parametrize("how, flags, why", [
    ("bomb", "", "checkpoint.pt is no checkpoint of plain tensors, or damaged"),
    ("pickle", "", "is no checkpoint of plain tensors, or damaged"),
    ("cut", "", "or damaged"), ("empty", "", "or damaged"), ("list", "", "or damaged"),
    ("renamed", "", "has the script changed?"), ("no seconds", "", "cannot resume"),
    ("no names", "", "cannot resume"), ("other images", "", "was made with images"),
    ("", "--lr .5", "was made with lr 0.001, not 0.5"),
    ("", "--tau .3", "was made with tau 0.2, not 0.3"),
    ("", "--batch_size 31", "was made with batch_size 32, not 31")])
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(how, flags, why, folder, tmp_path):
    spoil(folder, how)
    before = contents(folder)
    assert why in stops(tmp_path, "--resume", *flags.split())
    assert contents(folder) == before                       # so no code ran: Bomb would have made a folder


def test_the_checkpoint_of_another_method_is_refused_and_kept(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / NAME.replace("simclr", "byol")))
    assert "is one of simclr, not byol" in stops(tmp_path, "--resume", method="byol")
    assert contents(other) == contents(folder)


def test_resume_may_change_what_does_not_change_the_result(folder, tmp_path):
    assert go(tmp_path, "--resume", "--save_every", "1")["steps"] == 4 and len(log(folder)) == 2


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    line = stops(tmp_path, "--lr", "1e30", "--save_every", "1")
    assert "the loss is nan at step 1: lower --lr or try --precision fp32" in line and "checkpoint.pt" in line
    assert read(tmp_path / NAME / "checkpoint.pt")["step"] == 1 and len(log(tmp_path / NAME)) == 1
    line = stops(tmp_path / "b", "--lr", "1e30", "--save_every", "9")
    assert "checkpoint.pt" not in line                      # none was made, and none is promised


def test_a_disk_that_is_full_while_saving(folder, tmp_path):
    """RLIMIT_FSIZE stands in: the write fails half-way, and the checkpoint before it is whole."""
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint.pt"]) // 2, hard))
    try:
        line = stops(tmp_path, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {folder / 'checkpoint.pt'}" in line and "make room and --resume" in line
    assert contents(folder).keys() == before.keys() | {"log.jsonl"}      # and no half-written file
    assert contents(folder)["checkpoint.pt"] == before["checkpoint.pt"]
    assert go(tmp_path, "--resume")["steps"] == 4


def test_a_disk_that_is_full_while_logging(folder, tmp_path, monkeypatch):
    """The log is written more often than a checkpoint, so it meets the full disk first."""
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(folder)
    monkeypatch.setattr(os, "fsync", full)
    line = stops(tmp_path, "--resume")
    assert f"cannot write {folder / 'log.jsonl'}" in line and "make room" in line
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["g.png", "curves.png"])
def test_a_disk_that_is_full_while_drawing(folder, monkeypatch, name):
    """A picture is whole or not there; the checkpoint of the last step is, and its run can be finished."""
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    before, file = contents(folder), folder / name
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match=f"cannot write {re.escape(str(file))} .*make room and --resume"):
        if name == "g.png":
            common.save_grid(file, {"x": torch.zeros(1, 3, 8, 8)})
        else:
            common.save_curves(file, folder / "log.jsonl", {})
    assert contents(folder) == before


def test_scenes_have_no_single_label_and_are_not_classified(tmp_path):
    result = go(tmp_path, "--steps", "1", "--data", "toys:n=100,objects=3")
    assert result["steps"] == 1 and "knn" not in result


def test_a_run_of_epochs_counts_them(tmp_path):
    assert go(tmp_path, "--epochs", ".5")["steps"] == 4     # half of 300 // 32 = 9, rounded to even


@pytest.mark.parametrize("loss, parts, words", [
    (1.39, {}, "the loss sits on ln 4 = 1.386"), (.005, {}, "the loss sits on independent = 0.000"),
    (1.37, {}, None), (.02, {}, None), (2., dict(perplexity=1.9), "perplexity is 1.9, a collapse"),
    (2., dict(z=torch.ones(9, 3)), "z_std is 0, a collapse"), (2., dict(perplexity=2.1), None),
    (2., dict(z=torch.linspace(-1, 1, 64)[:, None] * torch.ones(8)), "z_rank is"),       # a line: std is 1
    (2., dict(z=torch.randn(64, 8, generator=torch.Generator().manual_seed(0))), None)])
def test_a_run_that_has_learned_nothing_is_named(loss, parts, words, tmp_path, capsys):
    """In its second half by the loss, after a tenth by the monitors; once each."""
    cfg = common.Config(data="toys:n=100", image_size=16, batch_size=50, steps=20, out=str(tmp_path))
    run, data, method = common.Run(cfg, __file__), common.load_data(cfg), torch.nn.Module()
    method.encoder = common.make_encoder(cfg)
    run.start(method, data, {"ln 4": math.log(4), "independent": 0.})
    said = {}
    for step, _ in run.steps(100):
        run.log(torch.tensor(loss), **parts)
        said[step] = capsys.readouterr().out
    first = next((step for step, text in said.items() if "WARNING" in text), None)
    if words is None:
        assert first is None
    else:
        assert first == (11 if "sits" in words else 3) and words in said[first]
        assert sum(text.count(words) for text in said.values()) == 1
