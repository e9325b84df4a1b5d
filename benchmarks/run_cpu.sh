#!/usr/bin/env bash
# Measure everything that benchmarks/README.md shows, on an idle machine: about 20 minutes on two
# cores. PYTHON names the interpreter; what it cannot import among the peers is left out, and said.
#
#   PYTHON=.venv/bin/python benchmarks/run_cpu.sh && python benchmarks/tables.py
set -euo pipefail
results=$(cd "$(dirname "$0")" && pwd)/results
python=${PYTHON:-python}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

bench() { # FILE OPTION...
  local out=$1
  shift
  "$python" -c 'from robustgate.cli import main; main()' bench --seconds 0.5 --peers --out "$out" "$@"
}

bench "$parts/1.csv" --op mixture_nll
bench "$parts/2.csv" --op jsd --mode forward backward forward_backward
bench "$parts/3.csv" --mode forward forward_backward --op expert_log_prob mixture_log_softmax \
  generalized_jsd mixture_kl linear_mixture_nll linear_jsd mixture_log_prob sequence_log_prob
bench "$parts/4.csv" --mode forward forward_backward --op linear_mixture_nll --experts 1
bench "$parts/5.csv" --mode forward frozen --op mixture_nll --threads "$(nproc)"
bench "$parts/6.csv" --mode forward --op jsd --threads "$(nproc)"
bench "$results/scaling.csv" --op mixture_nll jsd --sweep rows experts vocab threads

head -n 1 "$parts/1.csv" >"$results/cpu.csv"
for part in "$parts"/*.csv; do tail -n +2 "$part" >>"$results/cpu.csv"; done
