#!/usr/bin/env bash
# Run one slice of the evidence study on a borrowed GPU, within a time limit, and pack its results. See docs/slices.md.
#
#   benchmarks/slice.sh s1 --pack-inputs            here: pack what the slice reads into .inputs
#   benchmarks/slice.sh s1 --out "$OUT" --jobs 12   on the machine with the GPU
#   benchmarks/slice.sh s1 --miniature              all stages in tiny sizes, on any machine
#
# Any other option is one of the recipes' keys, as of `cocomix train`: --training.compile true. environment.sh says which
# Python and which packages it takes.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
"$PYTHON" benchmarks/slice.py "$@"
