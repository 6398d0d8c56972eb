#!/usr/bin/env bash
# Trains on this machine, on all its devices:
#   launch/local.sh --config=configs/quickstart.py --workdir=runs/quickstart [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m grain_jax.main "$@"
