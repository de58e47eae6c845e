"""Compiles the learner's gradient for slices of TPUs that are not there, and prints what each chip would hold as JSON: compile_for_tpus.py TOPOLOGY

TPU_LIBRARY_PATH names the compiler. First attention alone, of heads of unlike sizes, with a window, a cap and several sequences in a row. Then a small model
whose scores would be most of what a pass holds, over fsdp 2 x tp 2: with the kernel of such a device, and with attention left to the compiler.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pgrpo_jax import parallel
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.generation.scoring import score
from pgrpo_jax.models import transformer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.flash_attention import flash_attention
from pgrpo_jax.models.mesh import ROWS
from pgrpo_jax.models.parameters import parameter_shapes
from pgrpo_jax.structs import TrainBatch

MODEL = ModelConfig(
    num_layers=4, width=256, mlp_width=512, num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=512, context_length=2048, rope_theta=1e6,
    norm_epsilon=1e-6, tied_embeddings=True, qkv_bias=True,
)  # fmt: skip
PROMPTS, PER_PROMPT, TOKENS = 4, 4, 512


def batch(mesh):
    """Shapes of a batch whose rows lie over the mesh."""
    completions = PROMPTS * PER_PROMPT

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(ROWS)))

    return TrainBatch(
        prompts=of(jnp.int32, PROMPTS, TOKENS), prompt_lengths=of(jnp.int32, PROMPTS), preference_ids=of(jnp.int32, PROMPTS),
        completions=of(jnp.int32, completions, TOKENS), completion_mask=of(bool, completions, TOKENS), prompt_index=of(jnp.int32, completions),
        behaviour_log_probs=of(jnp.float32, completions, TOKENS), rewards=of(jnp.float32, completions), valid=of(bool, completions),
    )  # fmt: skip


def compiled(mesh, of_mesh):
    """(calls of kernels in the program, temporary bytes of each chip)."""
    model = transformer.Transformer(MODEL, dtype=jnp.bfloat16, remat="keep_nothing")
    model = transformer.laid_over(model, of_mesh)
    shapes = parameter_shapes(MODEL)
    shapes = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=where), shapes, parallel.layout(shapes, mesh))
    gradient = jax.grad(lambda params, given: jnp.sum(score(model, params, given, Support())[0]))
    program = jax.jit(gradient, out_shardings=jax.tree.map(lambda x: x.sharding, shapes)).lower(shapes, batch(mesh)).compile()
    return calls(program), program.memory_analysis().temp_size_in_bytes


def attention_alone(mesh, head_dim, dtype):
    """Calls of kernels in the gradient of attention with all that it can be asked for, 4 rows of 640 tokens over a prompt of 200."""

    def of(dtype, *shape, heads=None):
        spec = PartitionSpec(ROWS, *[None if axis != heads else "tp" for axis in range(1, len(shape))])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arrays = (
        of(dtype, 4, 640, 4, head_dim, heads=2), of(dtype, 4, 2, head_dim, 640, heads=1), of(dtype, 4, 2, 640, head_dim, heads=1),
        of(dtype, 2, 2, head_dim, 200, heads=1), of(dtype, 2, 2, 200, head_dim, heads=1),
    )  # fmt: skip
    fixed = of(bool, 2, 1, 200), of(jnp.int32, 2, 200), of(jnp.int32, 4, 640), of(jnp.int32, 4, 640)

    def summed(arrays, mask, at, positions, sequences):
        query, keys, values, *context = arrays
        limits = {"window": jnp.int32(100), "soft_cap": 30.0, "sequences": sequences}
        return jnp.sum(flash_attention(query, keys, values, [(*context, mask, at)], positions, scale=0.1, mesh=mesh, **limits).astype(jnp.float32))

    return calls(jax.jit(jax.grad(summed)).lower(arrays, *fixed).compile())


def calls(program):
    """Calls of kernels in a compiled program."""
    return program.as_text().count('custom_call_target="tpu_custom_call"')


def main():
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices)
    mesh = parallel.make_mesh(devices.tolist(), fsdp=2, tp=2)
    heads = [(80, jnp.bfloat16), (256, jnp.float32)]  # one that fills no whole lanes, one that fills much of the core's memory
    alone = {f"{size} {dtype.__name__}": attention_alone(mesh, size, dtype) for size, dtype in heads}
    names = ("calls", "bytes")
    print(json.dumps({"alone": alone, "kernel": dict(zip(names, compiled(mesh, mesh))), "compiler": dict(zip(names, compiled(mesh, None)))}))


if __name__ == "__main__":
    main()
