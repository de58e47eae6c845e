#!/usr/bin/env bash
# The tests: set-up with the development extras, model and data, pytest. Flags go to pytest:
#   [PYTHON=python3] ./launch/test.sh [tests/algorithms -k history ...]     everything but the tests marked "faults" or "parity", two files at a time
#   ./launch/test.sh --faults [...]                                         only those: they kill processes and take minutes each
#   ./launch/test.sh --parity [...]                                         only those against torch and transformers, which it installs (1 GB), Gemma 3 among them (0.3 GB), and through the compiler of TPUs (0.2 GB)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh

# A crashed worker ends the run: its successor would wait for ever (pytest-xdist #1323). A test that is stuck shows where, and its worker ends.
pytest=(.venv/bin/python -m pytest --numprocesses=2 --max-worker-restart=0 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true)
extra=dev also=() selection=(-m "not faults and not parity" --dist=loadfile)
case "${1:-}" in
  --faults) selection=(-m faults --dist=loadfile) && shift ;;
  --parity) extra=parity also=(--gemma) selection=(-m parity --dist=worksteal) && shift ;;
  *) echo "left out: tests that kill processes (--faults), tests against torch and transformers (--parity)" ;;
esac
setup_venv "$extra"

# Thousands of small programs, most of which run once: making them fast would take a third of the time. What is compared with torch and transformers is
# compiled as a user's is.
if [[ "$extra" == parity ]]; then
  export OMP_NUM_THREADS=1  # PyTorch's threads wait for each other by spinning: beside another process two are ten times slower than one
else
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1
  quick="${XLA_FLAGS:-} --xla_cpu_use_fusion_emitters=false"
  XLA_FLAGS="$quick" .venv/bin/python -c "import jax; jax.devices('cpu')" 2>/dev/null && export XLA_FLAGS="$quick"  # a flag that XLA knows no more ends the process
fi
run .venv/bin/python launch/fetch_assets.py "${also[@]}"
exec "${pytest[@]}" "${selection[@]}" "$@"
