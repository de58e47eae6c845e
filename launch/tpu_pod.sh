#!/usr/bin/env bash
# Trains on a TPU pod slice, spot unless told otherwise: asks for a queued resource, waits for it, sets every worker up, runs the same
# command on all of them, and does it all again when the slice is preempted, until the run has finished. Runs on your own machine; needs
# gcloud, logged in.
#   ./launch/tpu_pod.sh --name=NAME --zone=ZONE --accelerator-type=TYPE --config=configs/NAME.py --workdir=gs://BUCKET/RUN [OPTION ...]
#     --accelerator-type=TYPE    for example v5litepod-16, v6e-16, v5p-32
#     --runtime-version=VERSION  of the TPU software; follows from the type unless given
#     --project=PROJECT          gcloud's own unless given
#     --on-demand                no spot: it costs more and stays
#     --wait=SECS                longest wait for a slice; 86400 unless given
#     --poll=SECS                between two looks at it; 30 unless given
#     --retries=N                failures in a row, of the program or the connection, before giving up; 3 unless given
#     --keep                     leave the slice when the run has finished; it is deleted unless given
#     --dry-run                  print every command in order and run none
#   All other options go to launch/train.py, as they are: --config.key=value ...
# Exits 0 when finished, 75 when told to stop (the run is saved, the slice stays), 64 on wrong options, else as the program did at last.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "tpu_pod: $1" >&2
  exit "${2:-1}"
}

name="" zone="" type="" runtime="" project="" workdir="" spot=--spot wait_secs=86400 poll_secs=30 retries=3 keep="" dry_run=""
flags=(--config.distributed.enabled=True)
parse() {
  local option value
  for option in "$@"; do
    value="${option#*=}"
    case "$option" in
      --name=*) name="$value" ;;
      --zone=*) zone="$value" ;;
      --accelerator-type=*) type="$value" ;;
      --runtime-version=*) runtime="$value" ;;
      --project=*) project="$value" ;;
      --on-demand) spot="" ;;
      --wait=*) wait_secs="$value" ;;
      --poll=*) poll_secs="$value" ;;
      --retries=*) retries="$value" ;;
      --keep) keep=1 ;;
      --dry-run) dry_run=1 ;;
      --*)
        [[ "$option" != --workdir=* ]] || workdir="$value"
        flags+=("$option")
        ;;
      *) fail "argument $option is unexpected: every option is --name=value" 64 ;;
    esac
  done
  [[ -n "$name" && -n "$zone" && -n "$type" ]] || fail "--name, --zone and --accelerator-type are needed" 64
  [[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    fail "--name=$name is no resource name: lower-case letters, digits and -, at most 63" 64
  [[ "$workdir" == gs://?* ]] ||
    fail "--workdir=$workdir is not in a bucket: a preempted slice takes its disks along, give gs://BUCKET/RUN" 64
  [[ "$wait_secs" =~ ^[0-9]+$ && "$poll_secs" =~ ^[0-9]+$ && "$retries" =~ ^[0-9]+$ ]] ||
    fail "--wait=$wait_secs, --poll=$poll_secs, --retries=$retries: whole numbers are needed" 64
  if [[ -z "$runtime" ]]; then
    case "$type" in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      *) fail "--accelerator-type=$type has no runtime version that is known here: give --runtime-version" 64 ;;
    esac
  fi
}
parse "$@"
where=(--zone="$zone" ${project:+--project="$project"})
archive="${TMPDIR:-/tmp}/pgrpo_jax-$name.tar.gz"

child="" stopping="" interrupted=""
on_signal() {
  stopping=1 interrupted=1
  [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true
}
trap on_signal TERM INT

# Runs a command as a child that a signal reaches at once, as in relaunch.sh; prints it instead in a dry run.
run() {
  local code
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@"
    echo
    return 0
  fi
  "$@" &
  child=$!
  [[ -z "$stopping" ]] || kill -TERM "$child" 2>/dev/null || true
  while true; do
    interrupted="" code=0
    wait "$child" || code=$?
    [[ -n "$interrupted" ]] || break
  done
  child=""
  return "$code"
}

say() { echo "${dry_run:+# }tpu_pod: $*" >&"$((2 - ${dry_run:-0}))"; }

queued() { run gcloud compute tpus queued-resources "$@" "${where[@]}" --quiet; }
workers() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet --command="$1"; }

# The state of the request, "" where there is none.
state() {
  local found
  if ! found="$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>&1)"; then
    [[ "$found" == *NOT_FOUND* ]] || fail "gcloud describes no queued resource $name: $found"
    return 0
  fi
  echo "${found##*$'\n'}"  # warnings come on the lines before
}

# Whether the slice is there to be worked on: a preempted one may still count as ACTIVE for a while.
alive() {
  [[ "$(state)" == ACTIVE ]] &&
    [[ "$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null)" == READY ]]
}

create() { queued create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" ${spot:+"$spot"}; }
delete() { queued delete "$name" --force; }

acquire() {
  local now deadline=$((SECONDS + wait_secs))
  while [[ -z "$stopping" ]]; do
    now="$(state)"
    case "$now" in
      "")
        create || [[ -n "$stopping" ]] || fail "gcloud made no queued resource $name, see above"
        say "asked for $name ($type, $zone), looks every $poll_secs s, at most $wait_secs s"
        ;;
      ACTIVE)
        if alive; then return 0; fi
        say "the slice of $name is gone, deletes what is left"
        delete || true
        ;;
      FAILED | SUSPENDED)
        say "queued resource $name is $now: deletes it and asks again"
        delete || true
        ;;
    esac
    [[ "$SECONDS" -lt "$deadline" ]] ||
      fail "no slice within $wait_secs s (state ${now:-just asked for}): raise --wait or change --zone; the request $name stays queued"
    [[ "$now" == ACTIVE ]] || run sleep "$poll_secs" || true
  done
}

set_up() {
  run tar -czf "$archive" -C "$ROOT" --exclude=./.git --exclude=./.venv --exclude=./.assets --exclude=./.peers --exclude=./runs --exclude=__pycache__ . &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:pgrpo_jax.tar.gz" "${where[@]}" --worker=all --quiet &&
    workers "mkdir -p pgrpo_jax && tar -xzf pgrpo_jax.tar.gz -C pgrpo_jax && bash pgrpo_jax/launch/tpu_worker.sh setup"
}

train() { workers "bash pgrpo_jax/launch/tpu_worker.sh run$(printf ' %q' "${flags[@]}")"; }

delete_command="gcloud compute tpus queued-resources delete $name ${where[*]} --force"

finish() {
  [[ -n "$keep" ]] || delete || say "$name could not be deleted and goes on costing: $delete_command"
  [[ -n "$dry_run" ]] || rm -f "$archive"
}

# The workers do not notice that the connection ends: they are asked to save, over a new one.
told_to_stop() {
  stopping=""  # from here on a second signal ends this script's wait for them
  [[ -z "$ready" ]] || workers "bash pgrpo_jax/launch/tpu_worker.sh stop" ||
    say "the workers could not be asked to save: the last checkpoint counts"
  say "told to stop; $name stays, queued or at cost. To go on: the same command. To let go: $delete_command"
  exit 75
}

if [[ -n "$dry_run" ]]; then
  say "an old request of this name that is FAILED or SUSPENDED is deleted first; then:"
  create
  say "until ACTIVE, every $poll_secs s, at most $wait_secs s:"
  run gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
  set_up
  train
  say "exit status 75: the same command again; slice preempted: delete, create, set up and run again; at the end:"
  finish
  exit 0
fi

failures=0 ready=""
while true; do
  [[ -n "$ready" ]] || acquire
  code=0
  if [[ -z "$stopping" ]]; then { [[ -n "$ready" ]] || set_up; } && ready=1 && train || code=$?; fi
  if [[ -n "$stopping" ]]; then told_to_stop; fi
  case "$code" in
    0)
      finish
      say "finished: $workdir"
      exit 0
      ;;
    75)
      failures=0
      say "preempted and saved, runs again"
      ;;
    *)
      run sleep "$poll_secs" || true  # the state follows a preemption with a delay
      ;;
  esac
  if ! alive; then
    ready="" failures=0
    say "the slice was preempted (exit status $code), asks for another"
  elif [[ "$code" -ne 75 ]]; then
    ready="" failures=$((failures + 1))
    say "exit status $code, failure $failures in a row, and the slice is still there"
    [[ "$failures" -le "$retries" ]] ||
      fail "gives up (--retries=$retries); the slice stays, look at it: gcloud compute tpus tpu-vm ssh $name ${where[*]}" "$code"
  fi
done
