#!/usr/bin/env bash
# Runs a command until it has finished. Exit status 75 means "preempted and saved": the same command runs again, at once.
#   ./launch/relaunch.sh [--retries=N] [--wait=SECS] COMMAND [ARGUMENT ...]
#     --retries=N   other failures in a row after which it runs again as well (a SIGKILL, a node that went away); 0 unless given
#     --wait=SECS   pause before a failure is tried again; 10 unless given
# A SIGTERM or Ctrl-C is passed on to the command, which saves; nothing is started after that.
# Exits 0 when finished, 75 when told to stop (run the same again to go on), 64 on wrong options, else as the command did at last.
set -euo pipefail

retries=0 wait_secs=10
usage() {
  echo "relaunch: $1: ./launch/relaunch.sh [--retries=N] [--wait=SECS] COMMAND [ARGUMENT ...]" >&2
  exit 64
}
while [[ "${1:-}" == --* ]]; do
  [[ "$1" =~ ^--(retries|wait)=([0-9]+)$ ]] || usage "option $1 is not --retries=N or --wait=SECS with a whole number"
  if [[ "${BASH_REMATCH[1]}" == retries ]]; then retries="${BASH_REMATCH[2]}"; else wait_secs="${BASH_REMATCH[2]}"; fi
  shift
done
[[ $# -gt 0 ]] || usage "no command given"

child="" stopping="" interrupted=""
# shellcheck disable=SC2329  # the trap calls it
on_signal() {
  stopping=1 interrupted=1
  [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true
}
trap on_signal TERM INT

# In the foreground bash would put a signal off until the command ends, and the command would never hear of it.
run() {
  local code
  "$@" &
  child=$!
  [[ -z "$stopping" ]] || kill -TERM "$child" 2>/dev/null || true  # the signal came while the command was being started
  while true; do
    interrupted="" code=0
    wait "$child" || code=$?
    [[ -n "$interrupted" ]] || break  # a signal interrupts `wait` too: its exit code is then not the command's
  done
  child=""
  return "$code"
}

failures=0
while [[ -z "$stopping" ]]; do
  start=$SECONDS code=0
  run "$@" || code=$?
  if [[ "$code" -eq 0 ]]; then
    exit 0
  elif [[ -n "$stopping" ]]; then
    # The signal itself may end a command that has only just begun: it has nothing to save yet.
    if [[ "$code" -eq 75 || "$code" -eq 143 || "$code" -eq 130 ]]; then break; fi
    exit "$code"
  elif [[ "$code" -eq 75 ]]; then
    failures=0
    echo "relaunch: preempted and saved after $((SECONDS - start)) s, runs again" >&2
  else
    failures=$((failures + 1))
    if [[ "$failures" -gt "$retries" ]]; then
      echo "relaunch: exit status $code after $((SECONDS - start)) s: gives up (failure $failures in a row, --retries=$retries)" >&2
      exit "$code"
    fi
    echo "relaunch: exit status $code after $((SECONDS - start)) s: failure $failures in a row, runs again in $wait_secs s" >&2
    run sleep "$wait_secs" || true
  fi
done
echo "relaunch: told to stop; run the same command to go on" >&2
exit 75
