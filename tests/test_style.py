"""The house: what a reader may rely on in every file of methods/, kernels/ and tests/."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = sorted((ROOT / "methods").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
OTHERS = [ROOT / "common.py", *(ROOT / "results").glob("*.py"), *(ROOT / "tests").glob("*.py")]
ALL = METHODS + KERNELS + OTHERS
ALLOWED = {"torch", "triton", "einops", "numpy", "pytest", "hypothesis", "PIL", "scipy", "tqdm", "matplotlib"}
OWN = {"common", "kernels"}
NEED = ("views.py", "slots.py")                                  # augment.py, slot_attention.py
LOOP = [r"for step, index in run\.steps\(len\(data\.images\)\):", r"x(, y)? = data\.images\[index\]",
        r"set_lr\(optimizer, cosine\(step(, run\.total| - first, last - first), cfg\.lr, "
        r"warmup=cfg\.warmup\)\)",
        r"with run\.autocast\(\):", r"loss = model\(", r"optimizer\.zero_grad\(\)",
        r"run\.finite\(loss\)\.backward\(\)", r"optimizer\.step\(\)", r"run\.log\(loss"]


def name(file):
    return file.name


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("file", METHODS, ids=name)
def test_docstring(file):
    text = ast.get_docstring(ast.parse(file.read_text()))
    title = re.match(r"[\w -]+ \(\d{4}\): (.+)\.\n\n", text)
    assert title and len(title[1].split()) <= 8, "Title (year): the idea in at most eight words."
    assert re.search(r"arXiv \d{4}\.\d{4,5}", text) and "-->" in text
    for part in ("Good at:", "Not at:", "\nRun ", "\nDiffers"):
        assert part in text, part


@pytest.mark.parametrize("file", METHODS, ids=name)
def test_every_flag_says_what_it_is(file):
    classes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
    node, lines = next(n for n in classes if n.name == "Config"), file.read_text().splitlines()
    for field in (n for n in node.body if isinstance(n, ast.AnnAssign)):
        assert "  # " in lines[field.lineno - 1], field.target.id
        assert field.annotation.id in ("int", "float", "bool", "str")


@pytest.mark.parametrize("file", METHODS, ids=name)
def test_the_loop_is_the_same_everywhere(file):
    body = file.read_text().split("\ndef main(cfg):\n")[1]
    at = [re.search(line, body) for line in LOOP]
    assert all(at), [line for line, m in zip(LOOP, at, strict=True) if not m]
    assert [m.start() for m in at] == sorted(m.start() for m in at)
    assert body.rstrip().endswith('if __name__ == "__main__":\n    main(parse(Config, PAPER))')


@pytest.mark.parametrize("file", METHODS, ids=name)
def test_the_method_is_one_class_that_uses_nothing_of_common(file):
    """So it can be copied: the class named after the file, and what it calls, know torch and kernels/."""
    body = ast.parse(file.read_text()).body
    line = next(n for n in body if isinstance(n, ast.ImportFrom) and n.module == "common")
    shared = {alias.name for alias in line.names}
    own = {n.name: n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    used, new = set(), {n for n in own if n.lower() == file.stem.replace("_", "")}
    while new:                                                   # the functions of the file that they reach
        used |= new
        inside = [n for name in new & own.keys() for n in ast.walk(own[name])]
        new = {n.id for n in inside if isinstance(n, ast.Name)} - used
    assert shared and len(used) > 5 and not used & (shared | {"common"})


@pytest.mark.parametrize("file", METHODS + KERNELS + [ROOT / "common.py"], ids=name)
def test_imports(file):
    own = {"kernels"} if file.name in ("common.py", *NEED) else set() if file in KERNELS else OWN
    assert set(imports(file)) <= set(sys.stdlib_module_names) | ALLOWED | own


@pytest.mark.parametrize("file", [f for f in KERNELS if f.name not in NEED], ids=name)
def test_a_kernel_file_works_alone(file, tmp_path):
    shutil.copy(file, tmp_path)
    subprocess.run([sys.executable, "-c", f"import {file.stem}"], cwd=tmp_path, check=True)


def test_a_changed_copy_of_a_kernel_runs_beside_the_original(tmp_path):
    """Operators of one name would be one: each module has its own."""
    text = (ROOT / "kernels/sinkhorn.py").read_text()
    changed = text.replace(".softmax(1).to(s.dtype)", ".softmax(1).mul(2).to(s.dtype)")
    for folder, code in (("kernels", text), ("mine", changed)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sinkhorn.py").write_text(code)
    check = ("import torch, kernels.sinkhorn as a, mine.sinkhorn as b; s = torch.rand(6, 4); "
             "assert (2 * a.sinkhorn(s)).equal(b.sinkhorn(s))")
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}     # the operators in PyTorch
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True, env=plain)


def test_sizes():
    def length(file):
        return len(file.read_text().splitlines())
    assert length(ROOT / "common.py") <= 600
    assert all(length(f) <= 250 for f in METHODS + KERNELS)
    assert sorted(map(length, METHODS))[len(METHODS) // 2] < 150


def test_ruff():
    run = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("file", ALL, ids=name)
def test_no_machine_path(file):
    assert not re.search(r"(?<![\w./])/(work|root|home|Users)/", file.read_text())
