#!/usr/bin/env bash
# On a machine with a GPU: how fast the step is (8 minutes at most), then what must hold there.
#   launch/gpu_check.sh [--minutes=8] [any other flag of `python -m bench.train_step --device=gpu`]
# Results go to OUT (gpu_check/): bench.jsonl, tests.txt. It needs jax, flax, optax, scipy, torch,
# ml_collections, ftfy and pytest; what needs more is skipped and says so.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=.venv/bin/python
[ -x "$python" ] || python=python3
out=${OUT:-gpu_check}
for module in torch pytest; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" || {
    echo "error: launch/gpu_check.sh needs $module: $python -m pip install torch pytest" >&2
    exit 2
  }
done
mkdir -p "$out"

"$python" -m bench.train_step --device=gpu --cache="$out/cache" "$@" | tee "$out/bench.jsonl"
bench=$?
"$python" -m pytest tests/gpu -rs -p no:cacheprovider 2>&1 | tee "$out/tests.txt"
tests=$?
echo "gpu_check: bench ended with $bench, tests with $tests; see $out"
((bench == 0 && tests == 0))
