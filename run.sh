#!/usr/bin/env bash
#   ./run.sh                         train a masked autoencoder, offline, two minutes on two cores
#   ./run.sh METHOD [--flags]        train any method: ./run.sh simclr --data cifar10; ./run.sh simclr --help
#   ./run.sh test [pytest's flags]   all tests, on up to four cores (-n 0: in one process)
#   ./run.sh all [--flags]           every method with seeds 0, 1, 2 into results/, what is missing, then table
#   ./run.sh table                   write the tables of README and results/README
#   ./run.sh bench [FILE ...]        how fast the kernels are; without a GPU, what is fast on a CPU too
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$(command -v python3 || command -v python) || { echo "run.sh: install Python 3.11 or newer first"; exit 1; }
modern='import sys; sys.exit(sys.version_info < (3, 11))'
"$python" -c "$modern" || { echo "run.sh: $("$python" -V) is too old: install Python 3.11 or newer first"; exit 1; }

if ! "$python" -c "import torch" 2>/dev/null; then               # no active environment with torch: make one
    "$here/.venv/bin/python" -c "$modern" 2>/dev/null || "$python" -m venv --clear "$here/.venv"
    python=$here/.venv/bin/python
fi
if ! "$python" -c "import torch, einops, numpy, PIL, scipy, tqdm, matplotlib, pytest, xdist, hypothesis, ruff" 2>/dev/null; then
    skip='^$'
    for name in torch triton; do                                 # one that is there stays as it is
        if "$python" -c "import $name" 2>/dev/null; then skip="$skip|^$name"; fi
    done
    grep -Ev "$skip" "$here/requirements.txt" | "$python" -m pip install -r /dev/stdin
fi

case ${1:-mae} in
    test) shift; cd "$here" && exec "$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@" ;;
    all) shift; exec "$python" "$here/results/table.py" all "$@" ;;
    table) exec "$python" "$here/results/table.py" ;;
    bench) shift; "$python" "$here/results/bench.py" "$@" && exec "$python" "$here/results/table.py" ;;
    *)  [ -f "$here/methods/${1:-mae}.py" ] || {
            echo "run.sh: there is no ${1}. Give test, all, table, bench, or a method:" $(cd "$here/methods" && ls -- *.py | sed 's/\.py$//')
            exit 2
        }
        exec "$python" "$here/methods/${1:-mae}.py" "${@:2}" ;;
esac
