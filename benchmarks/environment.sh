# Sourced by scripts that may run on a borrowed machine: sets PYTHON and PYTHONPATH, and enters the project's root.
#
# PYTHON names the interpreter. Wheels in .whl/ are packages that the machine lacks; where it has no datasets, they are
# installed for this run only:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d .whl \
#     datasets dill multiprocess
cd "$(dirname "${BASH_SOURCE[0]}")/.."
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
