#!/usr/bin/env bash
# Builds, checks and measures on a host in one call; results go to the folder given.
#
#   benchmarks/host.sh RESULTS [PYTHON]
#
# Needs the build requirements and the runtime dependencies in PYTHON's environment; installs Moesaic there.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$1
python=${2:-python3}
mkdir -p "$results"

step() { # name, command...: its output goes to RESULTS/host.txt, its end to the screen, and its time is shown
    local name=$1 started=$SECONDS
    shift
    echo "== $name: $*" >>"$results/host.txt"
    "$@" 2>&1 | tee -a "$results/host.txt" | tail -n 40
    echo "== $name: exit ${PIPESTATUS[0]}, $((SECONDS - started)) s" | tee -a "$results/host.txt"
}

bench() { # what, preset, format, layers
    step "bench-$1-$2-$3" "$python" -m moesaic.cli.main bench "$1" --synthetic "$2" --format "$3" --layers "$4" "${@:5}"
}

step install "$python" -m pip install -q --no-build-isolation --no-deps .
step versions "$python" -c "import torch, transformers; print(torch.__version__, transformers.__version__)"
step doctor "$python" -m moesaic.cli.main doctor
step tests "$python" -m pytest -q -n 12 -p no:cacheprovider --durations 12 tests
step kernels "$python" benchmarks/kernels.py --seconds 0.5
bench decode qwen3-30b-a3b Q4_K 48
bench decode qwen3-30b-a3b Q2_K 12
bench decode qwen3-30b-a3b Q8_0 12
bench decode deepseek-v3 Q4_K 4
bench prefill qwen3-30b-a3b Q4_K 12 --prompt-tokens 512
bench prefill deepseek-v3 Q4_K 2 --prompt-tokens 512
