#!/usr/bin/env bash
# Check and measure what depends on a GPU, in at most 8 minutes: prints one table, writes benchmarks/results/gpu.json.
#
#   benchmarks/gpu.sh                one H100 or H200
#   benchmarks/gpu.sh --miniature    the same rows in tiny sizes, uncompiled, on any machine
#   benchmarks/gpu.sh --only '69m-gpu (plain|cocomix)'
#
# PYTHON names the interpreter. Wheels in .whl/ are packages that the machine lacks; they are installed for this run only:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d .whl \
#     datasets dill multiprocess
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G ".whl/*.whl" > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl
  export PYTHONPATH="$site:$PYTHONPATH"
fi
"$PYTHON" benchmarks/gpu.py "$@"
