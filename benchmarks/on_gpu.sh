#!/usr/bin/env bash
# Build, test and measure on a machine with a CUDA device and no network: under ten minutes, and
# what is done by then is kept.
#
#   PYTHON=python3 WHEELS=folder benchmarks/on_gpu.sh [OUT]
#
# PYTHON has torch, triton, pybind11, scikit-build-core, cmake, ninja and pytest. WHEELS may hold
# further packages to install (typer, rich, hypothesis, liger-kernel, ...). OUT, the folder of the
# results, is build/on_gpu.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(realpath -m "${1:-build/on_gpu}")
seconds_in_all=${SECONDS_IN_ALL:-570}
mkdir -p "$out"
rm -f "$out"/*.csv "$out"/*.log "$out/status.txt"
status=0

step() { # NAME SHARE COMMAND...: runs for at most SHARE seconds of what is left
  local name=$1 limit=$2 left=$((seconds_in_all - SECONDS))
  shift 2
  if ((left < 10)); then
    echo "$name: no time left" | tee -a "$out/status.txt"
    return
  fi
  printf '\n== %s (%ss of %s)\n' "$name" "$SECONDS" "$seconds_in_all"
  timeout --signal=INT --kill-after=10 "$((left < limit ? left : limit))" "$@" 2>&1 |
    tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  echo "$name: exit $code at ${SECONDS}s" | tee -a "$out/status.txt"
  ((code == 0)) || status=1
}

device() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit --format=csv
  nvcc --version | tail -n 2
  "$python" - <<'PY'
import torch, triton

print("torch", torch.__version__, "triton", triton.__version__)
properties = torch.cuda.get_device_properties(0)
print(properties)
source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
target = torch.zeros_like(source)
times = []
for _ in range(20):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    times.append(start.elapsed_time(end))
print(f"copy, read and written: {2 * source.numel() / sorted(times)[10] / 1e9:.3f} TB/s")
PY
}

build() {
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  "$python" -m venv --system-site-packages "$out/venv"
  # A plain python3 may itself be a venv, whose packages the new one does not see.
  "$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
    >"$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
  if [ -n "${WHEELS:-}" ]; then
    "$out/venv/bin/python" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
  fi
  "$out/venv/bin/python" -m pip install --no-build-isolation --no-deps --no-index --force-reinstall . \
    -C cmake.define.ROBUSTGATE_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$arch-real"
}

tests() { # OPTION...
  "$out/venv/bin/python" -m pytest tests/ops/test_cuda.py -q -p no:cacheprovider "$@"
}

sanitizer() { # TOOL OPTION...
  compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
    "$out/venv/bin/python" -m pytest tests/ops/test_cuda.py -q -x -p no:cacheprovider "${@:2}"
}

bench() { # FILE OPTION...
  "$out/venv/bin/python" -c 'from robustgate.cli import main; main()' bench --device cuda \
    --seconds 0.2 --peers --out "$out/$1" "${@:2}"
}

# Functions run in the time limit's own shell.
export -f device build tests sanitizer bench
export python out WHEELS="${WHEELS:-}"

shape=(--rows 8192 --vocab 128256 --dtype bfloat16)
step device 30 bash -c device
step build 240 bash -c build
step tests 120 bash -c 'tests -m cuda'
step bench_mixture_nll 60 bash -c 'bench mixture_nll.csv "$@"' _ --op mixture_nll --experts 4 "${shape[@]}"
step bench_jsd 60 bash -c 'bench jsd.csv "$@"' _ --op jsd --experts 4 "${shape[@]}" \
  --mode forward backward forward_backward
step memcheck 60 bash -c 'sanitizer memcheck -k "small and native"'
step racecheck 40 bash -c 'sanitizer racecheck -k "small and native and dtype1"'
step bench_two_experts 60 bash -c 'bench two_experts.csv "$@"' _ --op mixture_nll jsd --experts 2 \
  "${shape[@]}" --mode forward backward forward_backward
step bench_others 90 bash -c 'bench others.csv "$@"' _ --mode forward forward_backward --experts 4 \
  --rows 4096 --vocab 32000 --dtype bfloat16 --op expert_log_prob mixture_log_softmax mixture_kl \
  generalized_jsd mixture_log_prob
step bench_linear 60 bash -c 'bench linear.csv "$@"' _ --mode forward forward_backward \
  --op linear_mixture_nll linear_jsd --dtype bfloat16
cat "$out/status.txt"
exit "$status"
