# Sourced by local.sh and test.sh, from the root of the repository:
#   setup_venv [EXTRA]   makes or completes .venv; instant and offline when nothing changed since the last time
#   run COMMAND...       runs a stage of the script as a child that a SIGTERM or Ctrl-C to the script reaches at once
# shellcheck shell=bash

# What a user's shell or activated environment may set, and what would make .venv depend on it.
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX

child="" signalled=""
stop() {
  [[ -n "$child" ]] || exit 143
  signalled=1
  kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

# In the foreground bash would put a signal off until the stage ends, and a preempted training would never hear of it.
run() {
  local code
  "$@" &
  child=$!
  while true; do
    signalled="" code=0
    wait "$child" || code=$?
    [[ -n "$signalled" ]] || break  # a signal interrupts `wait` too: its exit code is then not the child's
  done
  child=""
  return "$code"
}

fail() {
  echo "set-up: $*" >&2
  exit 1
}

minor_version() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null; }

make_venv() {
  local python="${PYTHON:-python3}" version
  version="$(minor_version "$python")" || fail "$python does not run: install Python >= 3.11 or name one: PYTHON=/path/to/python3 $0"
  [[ "${version%%.*}" -eq 3 && "${version#*.}" -ge 11 ]] ||
    fail "$python is Python $version, this needs >= 3.11: install a newer one or name it: PYTHON=/path/to/python3 $0"
  echo "set-up: making .venv with Python $version"
  rm -rf .venv
  mkdir .venv
  touch .venv/unfinished
  run "$python" -m venv .venv || fail "$python -m venv failed, see above (on Debian: apt install python3-venv)"
}

# What an installation depends on. Checkouts move, and an editable install holds an absolute path.
stamp() {
  pwd
  minor_version .venv/bin/python
  cat setup.cfg pyproject.toml
}

setup_venv() {
  local extra="${1:-}" code=0 found wanted
  if command -v flock >/dev/null; then  # two scripts started together must not install into one .venv
    exec 9<setup.cfg
    flock -w 1800 9 || fail "waited 1800 s for another set-up of this checkout: stop it and run again"
  fi
  found="$(minor_version .venv/bin/python || true)"
  wanted="$found"  # a working .venv stays, whatever python3 means today; another $PYTHON is a wish
  [[ -z "${PYTHON:-}" ]] || wanted="$(minor_version "$PYTHON" || true)"
  # "unfinished" is left by an installation that was killed: packages may be half there, which pip would not notice.
  if [[ -z "$found" || "$found" != "$wanted" || -e .venv/unfinished ]]; then make_venv; fi
  if [[ "$(stamp)" != "$(cat ".venv/installed-${extra:-plain}" 2>/dev/null)" ]]; then
    echo "set-up: installing pgrpo_jax${extra:+[$extra]} and what it needs into .venv (a minute or two the first time)"
    touch .venv/unfinished
    run .venv/bin/python -m pip install -qq --disable-pip-version-check -e ".${extra:+[$extra]}" || code=$?
    [[ "$code" -lt 128 ]] || exit "$code"
    rm .venv/unfinished  # pip tidies up after its own errors
    [[ "$code" -eq 0 ]] || fail "pip failed (exit code $code, its errors are above): check the network and the disk, then run again"
    stamp >.venv/installed-plain  # with an extra, plain is installed as well
    stamp >".venv/installed-${extra:-plain}"
  fi
  exec 9<&-
}
