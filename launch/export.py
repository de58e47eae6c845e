"""Writes the policy of a run as a Hugging Face directory: python launch/export.py --config=configs/NAME.py --workdir=DIR --output=NEW [--dtype=TYPE]

The newest committed checkpoint becomes NEW, with config.json, safetensors, tokenizer and generation_config.json: for transformers, and for
--config.model.path. The configuration is the run's. Adapters are merged; where each preference group has its own, --preference_group=P says whose. TYPE is float32 (the checkpoint's bits, the default), bfloat16 or float16.

Exit status: 0 written, 75 stopped (run the same command again), 1 an error, said in one line; then NEW is not there.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pgrpo_jax.preemption import Stop  # noqa: E402

# Before the heavy imports: a SIGTERM that arrives while they run is honoured as well.
STOP = Stop().install()

from absl import flags  # noqa: E402

from launch import command_line  # noqa: E402
from pgrpo_jax.export import export  # noqa: E402
from pgrpo_jax.models.safetensors_weights import DTYPES  # noqa: E402

_OUTPUT = flags.DEFINE_string("output", None, "directory to make")
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "of the tensors")
_PREFERENCE_GROUP = flags.DEFINE_string("preference_group", "", "number or name: whose adapter is merged, where each has its own")

if __name__ == "__main__":
    command_line.run(
        lambda config, **run: export(
            config, **run, output=_OUTPUT.value, dtype=_DTYPE.value, preference_group=_PREFERENCE_GROUP.value, stop=STOP
        ),
        required=("workdir", "output"),
        options=f"--output=NEW [--dtype={'|'.join(DTYPES)}] [--preference_group=P]",
    )
