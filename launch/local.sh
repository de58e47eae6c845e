#!/usr/bin/env bash
# The demo: set-up, model and data, training with P-GRPO, evaluation, report. Flags go to train.py:
#   [WORKDIR=runs/movielens] [PYTHON=python3] ./launch/local.sh [--config.key=value ...]
# Exits 0 when finished, 75 when preempted and saved (the same command goes on), else as the stage that failed.
set -euo pipefail
WORKDIR="${WORKDIR:-}"
[[ -z "$WORKDIR" || "$WORKDIR" == /* || "$WORKDIR" == *://* ]] || WORKDIR="$PWD/$WORKDIR"  # the caller's, before we leave
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WORKDIR="${WORKDIR:-runs/movielens}"
for flag in "$@"; do
  [[ "$flag" != --workdir=* ]] || WORKDIR="${flag#*=}"  # train.py obeys the flag; the report must follow
done
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh

setup_venv
run .venv/bin/python launch/fetch_assets.py

run .venv/bin/python -c '
import statistics, time
import numpy as np

matrix = np.ones((2048, 2048), np.float32)
matrix @ matrix  # starts the threads
times = []
for _ in range(5):
    start = time.perf_counter()
    matrix @ matrix
    times.append(time.perf_counter() - start)
rate = 2 * 2048**3 / statistics.median(times) / 1e9
print(f"matmul rate of this machine: {rate:.0f} GFLOP/s (>= 200 is quiet; below it the times in the README scale)")
'

code=0
run .venv/bin/python launch/train.py --config=configs/movielens.py --workdir="$WORKDIR" "$@" || code=$?
if [[ "$code" -eq 75 ]]; then
  echo "preempted and saved; run the same command to go on" >&2
  exit 75
fi
[[ "$code" -eq 0 ]] || exit "$code"

run .venv/bin/python launch/report.py "$WORKDIR" >/dev/null  # it prints the path, as the next line does
echo "report: $WORKDIR/report.html (the whole took $((SECONDS / 60)) min $((SECONDS % 60)) s)"
