#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one command: build with the CUDA module, the GPU tests, the GPU benchmarks.
#
#   benchmarks/gpu_run.sh [out]       results go to `out`, else to $OUT, else to benchmarks/results/<machine>/
#
# For machines without a package index: wheels of what is missing there (scikit-build-core, pybind11, pytest-benchmark,
# ...) in wheelhouse/, or in the folder that WHEELHOUSE names:
#   pip download --dest wheelhouse --only-binary :all: scikit-build-core 'pybind11>=3.0' ninja cmake pytest-benchmark
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheelhouse=${WHEELHOUSE:-$root/wheelhouse}
out=${1:-${OUT:-}}
cd "$root"

# nvcc is often installed but not in PATH.
if ! command -v nvcc >/dev/null; then
  for home in "${CUDA_HOME:-}" /usr/local/cuda; do
    if [ -x "$home/bin/nvcc" ]; then export PATH=$home/bin:$PATH; fi
  done
fi
command -v nvcc >/dev/null || { echo "no nvcc in PATH, CUDA_HOME or /usr/local/cuda" >&2 && exit 1; }
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"'

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

local_wheels=()
if [ -d "$wheelhouse" ]; then local_wheels=(--no-index --find-links "$wheelhouse"); fi

# What the machine has is used as it is: only missing packages are installed, and torch is never replaced.
missing=$("$python" - <<'PY'
import importlib.util as util
packages = {
    "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11>=3.0",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "numpy": "numpy",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
}
print("\n".join(name for module, name in packages.items() if util.find_spec(module) is None))
PY
)
if [ -n "$missing" ]; then
  mapfile -t names <<<"$missing"
  pip install "${local_wheels[@]}" "${names[@]}"
fi
VLMKERNELS_CUDA=ON pip install --no-build-isolation --no-deps --force-reinstall .

# From here on `vlmkernels` is the installed package, not the source tree.
export PYTHONSAFEPATH=1
"$python" -c 'import vlmkernels; print(vlmkernels.__file__); print(vlmkernels.backends())'
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv || true

failed=0
"$python" -m pytest -m gpu tests || failed=1

# Benchmarks that need a GPU carry the marker too. 5: the suite has none for this device yet.
machine=$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()))')
arguments=(-m gpu benchmarks --save-results --machine "$machine")
if [ -n "$out" ]; then
  mkdir -p "$out"
  arguments+=(--benchmark-json "$out/gpu_benchmarks.json")
fi
status=0
"$python" -m pytest "${arguments[@]}" || status=$?
[ "$status" -eq 0 ] || [ "$status" -eq 5 ] || failed=1
if [ -n "$out" ]; then
  if [ -d "benchmarks/results/$machine" ]; then cp benchmarks/results/"$machine"/*.json "$out"; fi
  "$python" -c 'import json, vlmkernels.diagnostics as d; print(json.dumps(d.info(), indent=1))' >"$out/info.json"
fi
exit "$failed"
