#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one command: build with the CUDA module, the GPU tests, compute-sanitizer, the GPU
# benchmarks, and a page that says what came of it. A step that fails is noted, and the next one runs.
#
#   benchmarks/gpu_run.sh                         all steps, within ten minutes (LIMIT=585 seconds)
#   benchmarks/gpu_run.sh --quick                 fewer tests and rows, within four (LIMIT=235)
#   benchmarks/gpu_run.sh build tests             some steps: environment build tests large sanitize prepare benchmarks
#   benchmarks/gpu_run.sh prepare benchmarks      the others, later: what is built stays in build/gpu_run
#   DRY=1 benchmarks/gpu_run.sh                   without a GPU: every step of this script on the CPU, on small problems
#   benchmarks/gpu_run.sh wheel                   on a machine with nvcc, GPU or not: a wheel that `build` installs
#
# What comes out goes to $OUT, else to build/gpu_run/out: at most eight files, results by family among them.
# Rows also go to benchmarks/results/<card>/, to be committed; benchmarks/choose_defaults.py reads them there.
#
# Machines without a package index: wheels of what is missing there in wheelhouse/, or in the folder that WHEELHOUSE
# names. Building takes minutes; a wheel of ours that `wheel` put there is installed instead, where it is of this tree.
#   pip download --dest wheelhouse --only-binary :all: scikit-build-core 'pybind11>=3.0' ninja cmake pytest-benchmark
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
wheelhouse=${WHEELHOUSE:-$root/wheelhouse}
dry=${DRY:-}
work=$root/build/gpu_run
site=$work/site
out=${OUT:-$work/out}
log=$out/run.log
mkdir -p "$work" "$out"

all_steps=(environment build tests large sanitize prepare benchmarks)
quick=
steps=()
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    environment | build | tests | large | sanitize | prepare | benchmarks | wheel) steps+=("$argument") ;;
    *) echo "unknown step $argument; there are: ${all_steps[*]} wheel" >&2 && exit 2 ;;
  esac
done
share=2 # steps that are asked for by name may take twice what they may where all are run
[ "${#steps[@]}" -gt 0 ] || { steps=("${all_steps[@]}") && share=1; }
if [ -n "$quick" ]; then limit=${LIMIT:-235}; else limit=${LIMIT:-585}; fi
reserve=12 # seconds for the page at the end

# nvcc is often installed but not in PATH.
if ! command -v nvcc >/dev/null; then
  for home in "${CUDA_HOME:-}" /usr/local/cuda; do
    if [ -x "$home/bin/nvcc" ]; then export PATH=$home/bin:$PATH; fi
  done
fi

# From here on `vlmkernels` is what `build` installed, not the source tree; a dry run has nothing installed.
export PYTHONSAFEPATH=1
if [ -n "$dry" ]; then package=$root${PYTHONPATH:+:$PYTHONPATH}; else package=$site; fi
export PYTHONPATH=$package:$root/benchmarks
# Output appears as it is made, and is there when a step is cut off.
export PYTHONUNBUFFERED=1

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

source_digest() {
  find csrc vlmkernels CMakeLists.txt pyproject.toml -type f \
    ! -name '*.so' ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# Names of packages that this Python lacks, one a line.
missing_packages() {
  "$python" - <<'PY'
import importlib.util as util
packages = {
    "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11>=3.0",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "hypothesis": "hypothesis",
    "numpy": "numpy",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
}
print("\n".join(name for module, name in packages.items() if util.find_spec(module) is None))
PY
}

step_environment() {
  uname -a
  "$python" --version
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  "$python" -c 'import triton; print("triton", triton.__version__)'
  command -v nvcc && nvcc --version | tail -2
  command -v compute-sanitizer || echo "no compute-sanitizer"
  [ -n "$dry" ] && return 0
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total --format=csv
  "$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"; print(torch.cuda.get_device_properties(0))'
}

step_build() {
  if [ -n "$dry" ]; then
    source_digest && missing_packages && "$python" -c 'import vlmkernels; print(vlmkernels.backends())'
    return
  fi
  local local_wheels=() names=() missing wheel
  if [ -d "$wheelhouse" ]; then local_wheels=(--no-index --find-links "$wheelhouse"); fi
  # What the machine has is used as it is: only missing packages are installed, and torch is never replaced.
  missing=$(missing_packages)
  if [ -n "$missing" ]; then
    mapfile -t names <<<"$missing"
    pip install --target "$site" "${local_wheels[@]}" "${names[@]}" || return
  fi
  wheel=$(find "$wheelhouse" -name 'vlmkernels-*.whl' 2>/dev/null | head -1)
  if [ -n "$wheel" ] && [ "$(cat "$wheelhouse/source_digest" 2>/dev/null)" = "$(source_digest)" ] &&
    pip install --no-deps --no-index --upgrade --target "$site" "$wheel" &&
    "$python" -c 'from vlmkernels import _native; assert _native.cuda_reason is None, _native.cuda_reason'; then
    echo "installed $wheel"
  else
    # nvcc compiles for several architectures, one after the other unless told otherwise
    VLMKERNELS_CUDA=ON NVCC_APPEND_FLAGS="--threads 3" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
      pip install --no-build-isolation --no-deps --upgrade --target "$site" \
      --config-settings=build-dir="$work/build" . || return
  fi
  "$python" -c 'import vlmkernels; print(vlmkernels.__file__); print(vlmkernels.backends())'
}

step_wheel() {
  mkdir -p "$wheelhouse"
  VLMKERNELS_CUDA=ON CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    pip wheel --no-build-isolation --no-deps --wheel-dir "$wheelhouse" --config-settings=build-dir="$work/build" . &&
    source_digest >"$wheelhouse/source_digest"
}

# isolated.py: a process for every file or shard, and another after a crash. Warnings of this machine's torch are shown
# and fail nothing.
isolated() { "$python" benchmarks/isolated.py --log "$work/pytest.log" "$@"; }

step_tests() {
  local files=() families=() marked
  mapfile -t files < <(grep -lE 'mark\.gpu|emulated_cuda\.DEVICES' -r tests --include='test_*.py' | grep -v test_gpu_large | sort)
  families=(tests/ops/interpreted_*.py)
  marked=gpu
  [ -n "$quick" ] && families=()
  [ -n "$dry" ] && files=(tests/ops/test_gpu_large.py) && families=()
  # The families' files are run as they are here, not through test_triton.py.
  isolated --summary "$work/tests_gpu.json" --jobs 8 --shards 2 --seconds "$((seconds_left * 45 / 100))" "${files[@]}" \
    -- -m "$marked" -k "not family_on_the_gpu" -W default
  local status=$?
  if [ "${#families[@]}" -gt 0 ]; then
    isolated --summary "$work/tests_triton.json" --jobs 14 --shards 4 --seconds "$((seconds_left * 50 / 100))" \
      "${families[@]}" -- -W default || status=1
  fi
  return "$status"
}

# By themselves: they take most of the memory.
step_large() {
  isolated --summary "$work/tests_large.json" --seconds "$seconds_left" tests/ops/test_gpu_large.py -- -m gpu -W default
}

step_sanitize() {
  local status=0 tool backend
  if [ -n "$dry" ]; then
    "$python" tests/ops/gpu_calls.py --backend reference --device cpu
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then echo "there is no compute-sanitizer here" && return 1; fi
  # Without torch's caching an access outside a tensor is one outside an allocation.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for backend in cuda triton; do
    for tool in memcheck racecheck; do
      [ "$backend-$tool" = triton-racecheck ] && continue # the compiler places those barriers
      timeout "$seconds_left" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" tests/ops/gpu_calls.py --backend "$backend" --dtypes float16 >"$work/sanitize_${backend}_$tool.log" 2>&1 &
    done
  done
  for job in $(jobs -p); do wait "$job" || status=1; done
  for file in "$work"/sanitize_*.log; do
    echo "== $(basename "$file" .log)" && grep -E '=========|wrong|right' "$file" | head -40 && tail -3 "$file"
  done
  return "$status"
}

suites=(benchmarks/bench_gpu_attention.py benchmarks/bench_gpu_contrastive.py benchmarks/bench_gpu_quantized.py
  benchmarks/bench_gpu_topk.py)
quick_rows='(test_attention and not forward+backward) or (test_forward_and_backward and (32768 or 49408)) or '
quick_rows+='test_w8a8_linear_and_gelu or fp8 or (test_search and (10000-10] or 1-10])) or zero_shot or overhead or graph'
rows_options=(-m gpu)
[ -n "$quick" ] && rows_options+=(-k "$quick_rows")
[ -n "$dry" ] && rows_options=(--dry -k "ViT-B/32 or 49408 or fp8 or zero_shot or 10000-10]")

# Compiles what the rows need, several suites at a time; Triton and Inductor keep it on disk.
step_prepare() {
  export TORCHINDUCTOR_COMPILE_THREADS=2
  isolated --jobs 12 --shards 3 --seconds "$seconds_left" "${suites[@]}" -- "${rows_options[@]}" --prepare
}

step_benchmarks() {
  isolated --summary "$work/rows.json" --seconds "$seconds_left" "${suites[@]}" -- "${rows_options[@]}" \
    "--append=$work/rows.jsonl"
}

# Runs a step with a time limit of its own; notes its exit code and goes on.
run_step() {
  local name=$1 most=$(($2 * share)) began=$SECONDS status said
  seconds_left=$((limit - SECONDS - reserve))
  [ "$most" -lt "$seconds_left" ] && seconds_left=$most
  if [ "$seconds_left" -lt 5 ]; then
    said="not run: no time was left"
  else
    # a shell of its own, so that a limit ends all that the step started
    ("step_$name") >"$work/$name.log" 2>&1 &
    wait_for $! "$seconds_left"
    status=$?
    case $status in
      0) said=ok ;;
      124) said="cut off after $seconds_left s" ;;
      *) said="FAILED, exit code $status" ;;
    esac
  fi
  printf '%-12s %s, %d s\n' "$name" "$said" "$((SECONDS - began))" | tee -a "$out/summary.txt"
  { echo "===== $name: $said" && cat "$work/$name.log" 2>/dev/null; } >>"$log"
  if [ "$said" = ok ]; then tail -n 6 "$work/$name.log"; else tail -n 40 "$work/$name.log" 2>/dev/null; fi
  [ "$said" = ok ] || failed=1
}

# Exit code of a background job; 124 where it took longer and was ended, with what it had started.
wait_for() {
  local job=$1 most=$2 end=$((SECONDS + $2 + 5))
  while kill -0 "$job" 2>/dev/null; do
    if [ "$SECONDS" -ge "$end" ]; then
      end_tree "$job"
      wait "$job" 2>/dev/null
      return 124
    fi
    sleep 0.2
  done
  wait "$job"
}

# Ends a process that this script started, and its children.
end_tree() {
  local child
  for child in $(ps -o pid= --ppid "$1" 2>/dev/null); do end_tree "$child"; done
  kill -KILL "$1" 2>/dev/null
}

failed=0
seconds_left=0
: >"$out/summary.txt"
: >"$log"
rm -f "$work/pytest.log" "$work"/tests_*.json
for step in "${steps[@]}"; do
  case $step in
    environment) run_step environment 60 ;;
    build) run_step build 330 ;;
    wheel) limit=7200 && run_step wheel 7000 ;;
    tests) run_step tests 200 ;;
    large) [ -n "$quick" ] || run_step large 60 ;;
    sanitize) [ -n "$quick" ] || run_step sanitize 90 ;;
    prepare) run_step prepare 90 ;;
    benchmarks) rm -f "$work/rows.jsonl" && run_step benchmarks 330 ;;
  esac
done

# The page, and what is to be kept.
page() {
  local summaries=() arguments=(--out "$out") status=0
  shopt -s nullglob
  summaries=("$work"/tests_*.json)
  if [ "${#summaries[@]}" -gt 0 ]; then
    "$python" benchmarks/isolated.py --print "${summaries[@]}"
    "$python" -c 'import json, sys; print(json.dumps({f: json.load(open(f)) for f in sys.argv[1:]}))' \
      "${summaries[@]}" >"$out/tests.json" || status=1
  fi
  if [[ " ${steps[*]} " == *" benchmarks "* ]]; then
    [ -n "$dry" ] || arguments+=(--results benchmarks/results)
    "$python" benchmarks/gpu_results.py "$work/rows.jsonl" "${arguments[@]}" || status=1
  fi
  return "$status"
}
page >"$work/page.txt" 2>&1 || failed=1
tee -a "$out/summary.txt" <"$work/page.txt"
"$python" -c 'import json, vlmkernels.diagnostics as d; print(json.dumps(d.info(), indent=1))' >"$out/info.json"
if [ -f "$work/pytest.log" ]; then { echo "===== pytest" && tail -c 8000000 "$work/pytest.log"; } >>"$log"; fi
echo "in $SECONDS s; $out holds $(find "$out" -type f | wc -l) files"
exit "$failed"
