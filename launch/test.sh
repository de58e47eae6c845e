#!/usr/bin/env bash
# The tests: set-up with the development extras, model and data, pytest. Flags go to pytest:
#   [PYTHON=python3] ./launch/test.sh [tests/algorithms -k history ...]     everything but the tests marked "faults", two files at a time
#   ./launch/test.sh --faults [...]                                         only those: they kill processes and take minutes, one at a time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh

# A crashed worker ends the run: its successor would wait for ever (pytest-xdist #1323). A test that is stuck shows where, and its worker ends.
selection=(-m "not faults" --numprocesses=2 --dist=loadfile --max-worker-restart=0 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true)
if [[ "${1:-}" == "--faults" ]]; then
  selection=(-m faults)
  shift
fi
setup_venv dev
run .venv/bin/python launch/fetch_assets.py
exec .venv/bin/python -m pytest "${selection[@]}" "$@"
