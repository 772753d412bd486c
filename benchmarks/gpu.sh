#!/usr/bin/env bash
# Check and measure what depends on a GPU, in at most 8 minutes: prints one table, writes benchmarks/results/gpu.json.
#
#   benchmarks/gpu.sh                one H100 or H200
#   benchmarks/gpu.sh --miniature    the same rows in tiny sizes, uncompiled, on any machine
#   benchmarks/gpu.sh --only '69m-gpu (plain|cocomix)'
#
# environment.sh says which Python and which packages it takes.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
"$PYTHON" benchmarks/gpu.py "$@"
