"""The benchmark, at sizes where the interpreter is quick: each way runs, and all ways agree."""
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "results"))
bench = importlib.import_module("bench")
TINY = dict(N=6, D=5, M=9, B=2, H=2, d=4, S=3, R=4, K=7, side=16)
ALL = [(*c[:3], {k: TINY[k] for k in c[3]}, *c[4:]) for c in bench.CASES + bench.ON_A_CPU]
EACH = {c[2].__name__: c for c in ALL}


@pytest.mark.parametrize("case", EACH.values(), ids=EACH)
def test_every_way_gives_the_same(case):
    file, _, make, shape, *_ = case
    torch.manual_seed(0)
    inputs, ways, *_ = make(**shape)
    if file == "views":                                          # random: the same numbers for each
        ways = {k: lambda x, f=f: torch.manual_seed(0) and f(x) for k, f in ways.items() if "one" not in k}
    results = [bench.step(f, inputs)() for f in ways.values()]
    assert len(results) > 1 or file == "views"
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)
    assert len(results[0]) == (sum(x.requires_grad for x in inputs) or len(results[0]))


def test_main_appends_a_line_for_each_way_and_draws_them(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "ON_A_CPU", ALL)
    monkeypatch.setattr(bench, "GPU", False)
    monkeypatch.setattr(bench, "times", lambda call: call() is not None and [2., 1., 3.])
    for runs in 1, 2:
        bench.main(["sinkhorn"])
        text = (tmp_path / "results/kernels-cpu.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == 2 * runs
    assert {"kernel", "name", "shape", "way", "ms", "low", "high", "percent", "of", "machine", "torch",
            "triton", "commit", "command"} <= rows[0].keys()
    assert [r["goals"] for r in rows[:2]] == [{"ms": 1.4, "percent": 70}, {"times_ours": 6}]
    assert "times_ours" not in rows[0] and rows[1]["times_ours"] == 1.
    assert rows[0]["kernel"] == "sinkhorn" and (tmp_path / "results/kernels-cpu.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "need a GPU" in shown
    assert "; goal at most 1.4 ms, at least 70 %" in shown and ", 1 x ours; goal at least 6 x" in shown
    with pytest.raises(SystemExit, match="there are"):
        bench.main(["nothing"])


def test_a_way_that_fails_says_why_and_the_others_go_on(monkeypatch):
    def broken(x):
        raise RuntimeError("out of\n resource: shared memory")
    monkeypatch.setattr(bench, "GPU", False)
    case = bench.Case([torch.ones(3)], dict(ours=broken, eager=torch.exp))
    rows = list(bench.measure(case, 1., 1.))
    assert rows[0] == dict(way="ours", error="out of resource: shared memory") and rows[1]["ms"] >= 0


def test_bound_is_the_work_over_the_rate(monkeypatch):
    """1 GFLOP at 1 TFLOP/s takes 1 ms: 50 % when it took 2 ms."""
    monkeypatch.setattr(bench, "GPU", False)
    monkeypatch.setattr(bench, "times", lambda call: [2., 1., 3.])
    row, = bench.measure(bench.Case([], {"ours": abs}, flops=1e9), 1e12, 1.)
    assert row == dict(way="ours", ms=2., low=1., high=3., percent=50., of="GEMM")


def test_times_are_milliseconds(monkeypatch):
    monkeypatch.setattr(bench, "GPU", False)
    clock = iter(range(10_000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.times(lambda: None) == [1000.] * 3
