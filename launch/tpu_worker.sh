#!/usr/bin/env bash
# The part of tpu_pod.sh that runs on every worker of the slice, in the copy of the repository there; nodes of ray_cluster.yaml too.
#   bash launch/tpu_worker.sh setup          makes .venv for TPUs and fetches model and data
#   bash launch/tpu_worker.sh run [FLAG ...] runs launch/train.py FLAG ..., in place of one whose connection was lost
#   bash launch/tpu_worker.sh stop           asks a running one to save and stop, and waits until it has
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PIDFILE="train.pid"
STOP_SECS=600  # for the step that is under way, and the save

# Prints the process of the training that was started here, if it still runs: a number may have passed on to another program.
running() {
  local pid
  pid="$(cat "$PIDFILE" 2>/dev/null)" || return 1
  [[ "$pid" =~ ^[0-9]+$ && -r "/proc/$pid/cmdline" && "$(tr '\0' ' ' <"/proc/$pid/cmdline")" == *launch/train.py* ]] && echo "$pid"
}

stop_running() {
  local pid deadline=$((SECONDS + STOP_SECS))
  pid="$(running)" || return 0
  echo "tpu_worker: asks process $pid to save and stop" >&2
  kill -TERM "$pid" 2>/dev/null || true
  while running >/dev/null; do
    if [[ "$SECONDS" -ge "$deadline" ]]; then
      echo "tpu_worker: process $pid did not stop within $STOP_SECS s: kill it (kill -KILL $pid), the last checkpoint is what it leaves" >&2
      exit 1
    fi
    sleep 1
  done
}

setup() {
  if [[ -z "${PYTHON:-}" ]] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python3 -m pip install --quiet --user uv  # runtime images come with an older Python
    python3 -m uv python install --quiet 3.11
    PYTHON="$(python3 -m uv python find --no-project 3.11)"
    export PYTHON
  fi
  # shellcheck source=launch/setup_venv.sh
  source launch/setup_venv.sh
  setup_venv tpu
  run .venv/bin/python launch/fetch_assets.py
}

case "${1:-}" in
  setup) setup ;;
  run)
    stop_running
    echo $$ >"$PIDFILE"
    exec .venv/bin/python launch/train.py "${@:2}"
    ;;
  stop) stop_running ;;
  *)
    echo "tpu_worker: ${1:-nothing} is not setup, run or stop" >&2
    exit 64
    ;;
esac
