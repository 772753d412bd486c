#!/usr/bin/env bash
# Run one slice of the evidence study on a borrowed GPU, within a time limit, and pack its results. See docs/slices.md.
#
#   benchmarks/slice.sh s1 --pack-inputs            here: pack what the slice reads into .inputs
#   benchmarks/slice.sh s1 --out "$OUT" --jobs 12   on the machine with the GPU
#   benchmarks/slice.sh s1 --miniature              all stages in tiny sizes, on any machine
#
# Any other option is one of the recipes' keys, as of `cocomix train`: --training.compile true. PYTHON names the
# interpreter. Wheels in .whl/ (see gpu.sh) are installed for this run only, where the machine lacks datasets.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
lacks_datasets="import importlib.util, sys; sys.exit(importlib.util.find_spec('datasets') is not None)"
if compgen -G ".whl/*.whl" > /dev/null && "$PYTHON" -c "$lacks_datasets"; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl
  export PYTHONPATH="$site:$PYTHONPATH"
fi
"$PYTHON" benchmarks/slice.py "$@"
