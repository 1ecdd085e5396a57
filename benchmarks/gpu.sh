#!/usr/bin/env bash
# All that needs a CUDA device: its tests and its figures, in under eight minutes. From anywhere, in any environment
# that has torch, triton and transformers:
#
#     [PYTHON=python3] [WHEELS=folder of pure Python wheels] [OUT=docs/results/gpu] benchmarks/gpu.sh [STEP...]
#
# The steps are mix, sampling, backbone, train_step and tests, by default all of them.
# Nothing is fetched: the wheels (pytest, jaxtyping, beartype, ...) are unpacked beside the results' scratch and found
# by PYTHONPATH. Each step has its own time; one that fails or needs a library that is missing leaves the others be.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "benchmarks/gpu.sh finds no ${PYTHON:-python3}" >&2; exit 2; }
python=$(realpath --no-symlinks "$python")
out=$(realpath --canonicalize-missing "${OUT:-$root/docs/results/gpu}")
wheels=${WHEELS:+$(realpath --canonicalize-missing "$WHEELS")}
cd "$root" || exit 2

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "benchmarks/gpu.sh needs a CUDA device and a torch that sees it; $python finds none" >&2
    exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
export PYTHONPATH="$root/src:$scratch/packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
if [[ -n $wheels ]]; then
    if ! "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
        --target "$scratch/packages" "$wheels"/*.whl; then
        echo "benchmarks/gpu.sh could not unpack the wheels of $wheels" >&2
        exit 2
    fi
fi

summary=()
good=0
bad=0

# step NAME SECONDS COMMAND...: the command's output goes to NAME.log; a missing library is no failure.
wanted=" ${*:-mix sampling backbone train_step tests} "
step() {
    local name=$1 limit=$2 began=$SECONDS code=0 missing
    [[ $wanted == *" $name "* ]] || return 0
    shift 2
    echo "== $name: $*"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    missing=$(tail -n 2 "$out/$name.log" | grep -oE "No module named '?[A-Za-z0-9_.]+'?" | tail -n 1)
    tail -n 15 "$out/$name.log"
    if [[ $code -eq 0 ]]; then
        good=$((good + 1))
        summary+=("$name: ok, $((SECONDS - began)) s")
    elif [[ $code -eq 124 || $code -eq 137 ]]; then
        bad=$((bad + 1))
        summary+=("$name: failed, not done in $limit s; see $out/$name.log")
    elif [[ -n $missing ]]; then
        summary+=("$name: skipped, ${missing,}")
    else
        bad=$((bad + 1))
        summary+=("$name: failed with code $code after $((SECONDS - began)) s; see $out/$name.log")
    fi
}

step mix 60 "$python" benchmarks/mix_gpu.py --out "$out/mix.json"
step sampling 120 "$python" benchmarks/sampling.py --scale paper --device cuda --others 1 --repeats 2 \
    --out "$out/sampling.json"
step backbone 60 "$python" benchmarks/backbone.py --out "$out/backbone.json"
step train_step 50 "$python" benchmarks/train_step.py --scale paper --device cuda --steps 5 --out "$out/train_step.json"

if [[ $wanted == *" tests "* ]]; then
    # Of the files with tests for a GPU, those that can be imported here.
    mapfile -t marked < <(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests | sort)
    timeout --kill-after=5 30 "$python" -m pytest -p no:cacheprovider --collect-only -q -m gpu \
        --continue-on-collection-errors "${marked[@]}" >"$out/collected.log" 2>&1
    files=()
    for file in "${marked[@]}"; do
        if grep -q "^ERROR $file" "$out/collected.log"; then
            summary+=("$file: skipped, it cannot be imported here; see $out/collected.log")
        else
            files+=("$file")
        fi
    done

    # Most of their time is compiling kernels, which pytest-xdist spreads over the cores.
    spread=()
    "$python" -c 'import xdist' 2>/dev/null && spread=(-n 8 -p no:benchmark)
    step tests 120 "$python" -m pytest -p no:cacheprovider -m gpu -rs --durations 5 "${spread[@]}" "${files[@]}"
fi

echo
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
[[ $bad -eq 0 && $good -gt 0 ]]
