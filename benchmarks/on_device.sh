#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 9.5 minutes that needs no network: build, tests, sanitizers, benchmarks, ncu.
#
#     benchmarks/on_device.sh             on a machine with an NVIDIA GPU, nvcc, torch >= 2.11, Triton >= 3.6 and the package's extra "test"
#     benchmarks/on_device.sh --part PART tests (with sanitizers), benchmarks or profile (ncu) alone, where all of it does not fit
#     benchmarks/on_device.sh --dry-run   the same steps on the CPU, tiny, in a minute or two; also of one part
#
# Writes results.json (benchmarks/collect_results.py says what it holds), table.txt, the two pictures of `genrep bench` and the logs of every
# group of steps to $OUT. They are written anew as steps end, so that an interrupted run leaves what it measured; accuracy.txt, the error of every
# result that the tests compare as a part of its bound, grows line by line. Each step has its own time limit, and what no longer fits
# is left out. The exit status is 0 where every step passed or was skipped for want of a tool. Nothing is installed: the package is copied
# to a temporary folder, and its native code built there.
#
# Environment: OUT (default ./device-results, or a folder of the part's name in it), PYTHON (python3), DEADLINE (seconds for everything), WHEELS (.whl: a folder of wheels of what
# this Python lacks, e.g. diffusers and torchjd; one of genrep_fast itself is tested instead of a build), TESTS (files of tests without test_
# and .py; a comma and a keyword expression with + for spaces behind one choose some of its tests), PYTEST_ADDOPTS, COMMIT (where git cannot
# say).

set -u -o pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || exit 2
WHEELS=${WHEELS:-$ROOT/.whl}
DEADLINE=${DEADLINE:-560} # seconds, and 10 more for what ignores the first signal

DRY= PART=
while (($#)); do
    case "$1 ${2-}" in
        --dry-run\ *) DRY=yes ;;
        --part\ tests | --part\ benchmarks | --part\ profile) PART=$2 && shift ;;
        *) echo "usage: [OUT=folder] $0 [--part tests|benchmarks|profile] [--dry-run]" >&2; exit 2 ;;
    esac
    shift
done
OUT=${OUT:-device-results${PART:+/$PART}}
has_part() { [[ ! $PART || $PART == "$1" ]]; }

if [[ $DRY ]]; then
    export CUDA_VISIBLE_DEVICES="" GENREP_FAST_CUDA=0
    TESTS=${TESTS:-aligner aligned_adamw rules}
elif capability=$(nvidia-smi --id=0 --query-gpu=compute_cap --format=csv,noheader); then
    export CUDA_VISIBLE_DEVICES=0 GENREP_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability+PTX"
    kernels="scoring_kernels,triton scoring_kernels,cuda shared_centers_kernels states_kernels posterior_kernels reverse_step_kernels kernel_calls alignment_kernels optimizer_kernels triton"
    TESTS=${TESTS:-$kernels alignment optimizer aligner aligner_gradients zero_gradients left_gradients aligned_adamw rules}
    # Triton compiles a kernel for every dtype and layout, which keeps many processors busy.
    "$PYTHON" -c "import xdist" 2>/dev/null && WORKERS=$(($(nproc) * 3 / 4))
else
    echo "$0: nvidia-smi names no GPU; --dry-run runs the same steps on the CPU" >&2; exit 2
fi

mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
rm -f "$OUT"/{results.json,table.txt,accuracy.txt,roofline.png,training_step.png,build.log,tests.log,sanitizers.log,benchmarks.log}
WORK=$(mktemp -d)
SITE=$WORK/site
mkdir -p "$WORK"/{status,logs,junit,benchmarks} "$SITE"
WHEELS=$(cd "$ROOT" && realpath -m "$WHEELS")
COMMIT=${COMMIT:-$(git -C "$ROOT" describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown)}
# From here on `import genrep_fast` finds the copy, in the steps' subprocesses as well: nothing runs in the source tree.
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PATH=$SITE/bin:$PATH PYTHONUNBUFFERED=1 COMMIT
export GENREP_FAST_ACCURACY_FILE=$OUT/accuracy.txt
export TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
cd "$WORK" || exit 2

# The logs and results so far; fails unless everything has run and succeeded.
publish() {
    local folder
    for folder in "$WORK"/logs/*/; do [[ -d $folder ]] && (cd "$folder" && tail -v -n +1 -- *) >"$OUT/$(basename "$folder").log"; done
    "$PYTHON" "$ROOT/benchmarks/collect_results.py" results "$WORK" "$OUT"
}

# step GROUP NAME SECONDS COMMAND...: the command's log and status, within the seconds and the deadline.
step() {
    local group=$1 name=$2 limit=$3 left=$((DEADLINE - SECONDS)) start=$SECONDS status
    shift 3
    [[ $DRY ]] && limit=$left # nothing is measured, maybe beside other work
    if ((left < 15)); then
        skip "$group" "$name" "no time was left"
        return
    fi
    mkdir -p "$WORK/logs/$group"
    # SIGINT, which a background job would ignore, lets pytest write what has passed.
    timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) env --default-signal=INT "$@" >"$WORK/logs/$group/$name" 2>&1
    status=$?
    echo "$status $((SECONDS - start))" >"$WORK/status/$group:$name"
    echo "$group $name: exit status $status after $((SECONDS - start)) s"
}

skip() { # GROUP NAME REASON
    echo "skipped: $3" >"$WORK/status/$1:$2"
    echo "$1 $2: skipped: $3"
}

trap 'publish; rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM
echo "commit $COMMIT"
[[ $DRY ]] || nvidia-smi

# Build

build() {
    cp -r "$ROOT/genrep_fast" "$SITE" && cp -r "$ROOT/kernels/triton" "$SITE/genrep_fast/kernels" &&
        cp -r "$ROOT/benchmarks" "$SITE/genrep_fast/benchmarks" || return
    rm -f "$SITE"/genrep_fast/*.so
    PYTHONPATH=$ROOT/csrc:$PYTHONPATH "$PYTHON" -c 'import sys, pathlib, build; build.build(*map(pathlib.Path, sys.argv[1:]))' \
        "$SITE/genrep_fast" "$WORK/objects"
}
export -f build
export ROOT SITE WORK PYTHON
if compgen -G "$WHEELS/*.whl" >/dev/null; then
    step build wheels 60 "$PYTHON" -m pip install --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$SITE" "$WHEELS"/*.whl
fi
compgen -G "$SITE/genrep_fast/_C_cuda.so" >/dev/null || step build native_code 240 bash -c build
step build environment 40 "$PYTHON" "$ROOT/benchmarks/collect_results.py" environment "$WORK/environment.json"
cat "$WORK/environment.json"
publish

# Tests: a process each, as an illegal access leaves none of the process's later calls to the GPU. Beside them the sanitizers, one by one.

sanitize() {
    local tool backend sanitizer
    if [[ $DRY ]]; then
        step sanitizers no_tool,cpu 60 "$PYTHON" "$ROOT/benchmarks/operators_once.py" cpu
        return
    fi
    sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin type -P compute-sanitizer)
    for backend in cuda triton; do
        # Compiling inside of the tool would take minutes.
        [[ $backend == triton ]] && step sanitizers no_tool,triton 90 "$PYTHON" "$ROOT/benchmarks/operators_once.py" triton
        for tool in memcheck racecheck; do
            if [[ $sanitizer ]]; then
                # Without torch's caching allocator every tensor ends where its memory does.
                step sanitizers "$tool,$backend" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 99 \
                    "$PYTHON" "$ROOT/benchmarks/operators_once.py" "$backend"
            else
                skip sanitizers "$tool,$backend" "there is no compute-sanitizer"
            fi
        done
    done
}

run_tests() {
    sanitize &
    for name in $TESTS; do
        while (($(jobs -rp | wc -l) >= $(nproc))); do wait -n; done
        IFS=, read -r file keyword <<<"$name"
        path=$(find "$ROOT/tests" -name "test_$file.py")
        options=()
        [[ $name == scoring_kernels* && ${WORKERS-} ]] && options=(-n "$WORKERS")
        # -v: of a run that is cut off the lines of single tests are left, written as each ends.
        OMP_NUM_THREADS=1 step tests "$name" 200 "$PYTHON" -m pytest -v --durations=3 -p no:cacheprovider \
            --junitxml="$WORK/junit/$name.xml" "${options[@]}" -k "${keyword//+/ }" "${path:-$ROOT/tests/test_$file.py}" &
    done
    wait
    publish
}

# Benchmarks, which have the machine for themselves; the most telling ones first.

bench() { # NAME SECONDS OPTION...
    step benchmarks "$1" "$2" "$PYTHON" -m genrep_fast bench --output "$WORK/benchmarks/$1" "${@:3}"
    publish
}

profile() {
    local backend ncu
    ncu=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin type -P ncu)
    for backend in cuda triton; do
        if [[ $DRY ]]; then
            skip benchmarks "ncu_$backend" "a dry run has no GPU"
        elif [[ $ncu ]]; then
            step benchmarks "ncu_$backend" 60 "$ncu" --profile-from-start off --clock-control none --csv \
                --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum \
                "$PYTHON" -m genrep_fast.benchmarks.bench_operators "$backend"
        else
            skip benchmarks "ncu_$backend" "there is no ncu"
        fi
    done
    publish
}

has_part tests && run_tests
if [[ $DRY ]] && has_part benchmarks; then
    bench quick 120 --suite optimizer scoring --case 's* backward' --seconds 0.02 --threads 1
    bench operators 60 --suite operators --case '* small' --seconds 0.02 --threads 1
elif has_part benchmarks; then
    bench operators 120 --suite operators --seconds 0.1
    bench quick 160 --quick --seconds 0.3
fi
has_part profile && profile
if [[ ! $DRY ]] && has_part benchmarks; then
    bench large 120 --suite alignment optimizer --case '1e8*' --seconds 0.5
    bench scoring 120 --suite scoring --case '[is]*' --seconds 0.5
fi
trap 'rm -rf "$WORK"' EXIT
touch "$WORK/finished"
publish
status=$?
cat "$OUT/table.txt"
exit $status
