"""The learner's gradient, compiled for TPUs by their own compiler, which needs none: the kernels are accepted, on a mesh, and scores take no memory."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(__file__).parent / "compile_for_tpus.py"

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def libtpu():
    """The compiler, of the version that jax[tpu] names, in a directory of its own: in this environment every program would look for a TPU."""
    wanted = next(line for line in importlib.metadata.requires("jax") if line.startswith("libtpu")).partition(";")[0].strip()
    folder = ROOT / ".peers" / wanted.removesuffix(".*")
    library = folder / "libtpu" / "libtpu.so"
    if not library.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wanted], check=True, timeout=900)
    return library


def test_the_gradient_compiles_and_holds_no_scores(libtpu, record_property):
    environment = os.environ | {"TPU_LIBRARY_PATH": str(libtpu), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, PROGRAM, "v5e:2x2"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kernel, compiler = found["kernel"], found["compiler"]
    record_property("measured", f"four chips of a v5e: temporaries of a gradient {kernel['bytes'] / 2**20:.0f} MiB a chip, {compiler['bytes'] / 2**20:.0f} without the kernel")
    assert set(found["alone"].values()) == {2 + 4}  # two parts; of each one pass forward and two back
    # Prompts have one part, completions two; of each a forward pass, again on the way back, and two that give gradients. The scan holds one layer.
    assert (kernel["calls"], compiler["calls"]) == (12, 0)
    assert kernel["bytes"] < compiler["bytes"] / 2
