"""A tiny transformer and random rollouts for the tests of the learner's side; shapes are shared, so that programs compile once.

P = 8 prompts of up to 6 tokens, G = 4 completions of up to 5 tokens, 32 token ids, 3 preference groups; the model can be cut over
fsdp 8 or fsdp 4 x tp 2 devices.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax import parallel
from pgrpo_jax import kl_control
from pgrpo_jax.algorithms import presets, reward_history
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.curation import Curation
from pgrpo_jax.learner import Learner
from pgrpo_jax.learner_settings import LearnerSettings
from pgrpo_jax.models import transformer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes
from pgrpo_jax.optimiser import OptimiserSettings
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import Prompt, Rollouts, TrainBatch, Work
from pgrpo_jax.train_state import initial_state
from pgrpo_jax.update import LossSettings

P, G, TP, TC, V, K = 8, 4, 6, 5, 32, 3
PAD = 0
CONFIG = ModelConfig(
    num_layers=2, width=16, mlp_width=20, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=V, context_length=32,
    rope_theta=10000.0, norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
LOSS = LossSettings(objective=Objective(max_length=TC), support=Support(), num_preference_groups=K)
OPTIMISER = OptimiserSettings(
    learning_rate=3e-3, schedule="linear", warmup_steps=0, num_updates=60, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01, clip_norm=1.0
)
SETTINGS = LearnerSettings(
    num_steps=20, schedule=Schedule(), num_preference_groups=K, completions_per_prompt=G, micro_batches=1, passes_per_batch=1,
    pad_id=PAD, loss=LOSS, optimiser=OPTIMISER, weights_dtype="float32", curation=Curation(prompts_per_step=P, max_new_tokens=TC),
)  # fmt: skip


def named(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def params(name: str, dtype=np.float32, config=CONFIG):
    """Random parameters; norm scales about 1."""
    rng = named(name)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) * 0.4
        return jnp.asarray(values + 1 if "norm" in jax.tree_util.keystr(path) else values, dtype)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))


def batch(name: str, dtype=np.float32) -> TrainBatch:
    """Uneven lengths, a full and an empty completion, four rows that only pad; the second half of the prompts is answered briefly."""
    rng = named(name)
    lengths = np.concatenate([rng.integers(3, TC + 1, P * G // 2), rng.integers(1, 3, P * G // 2)])
    lengths[:2] = TC, 0
    valid = np.ones(P * G, bool)
    valid[[5, 6, 7, 30]] = False
    return TrainBatch(
        prompts=rng.integers(1, V, (P, TP)).astype(np.int32),
        prompt_lengths=rng.integers(1, TP + 1, P).astype(np.int32),
        preference_ids=rng.integers(0, K, P).astype(np.int32),
        completions=rng.integers(1, V, (P * G, TC)).astype(np.int32),
        completion_mask=np.arange(TC)[None, :] < lengths[:, None],
        prompt_index=np.repeat(np.arange(P, dtype=np.int32), G),
        behaviour_log_probs=-rng.exponential(2.0, (P * G, TC)).astype(dtype),
        rewards=rng.random(P * G).astype(dtype),
        valid=valid,
    )


def rollouts(index: int, *, version: int = 0, prompts: int = P, step: int = 0) -> Rollouts:
    """One unit of work with random tokens and rewards, a pure function of its index; lengths from 1 token on."""
    rng = named(f"rollouts {index}")
    rows = prompts * G
    lengths = rng.integers(1, TC + 1, rows).astype(np.int32)
    sampled = np.arange(TC)[None, :] < lengths[:, None]
    preference_ids = rng.integers(0, K, prompts)
    rewards = (rng.random(rows) + np.repeat(preference_ids, G)).astype(np.float32)
    return Rollouts(
        work=Work(index=index, step=step, version=version),
        prompt_records=tuple(Prompt(f"prompt-{index}-{p}", "text", int(k), {}) for p, k in enumerate(preference_ids)),
        prompts=rng.integers(1, V, (prompts, TP)).astype(np.int32),
        prompt_lengths=rng.integers(1, TP + 1, prompts).astype(np.int32),
        completions=np.where(sampled, rng.integers(1, V, (rows, TC)), PAD).astype(np.int32),
        completion_lengths=lengths,
        prompt_index=np.repeat(np.arange(prompts, dtype=np.int32), G),
        behaviour_log_probs=np.where(sampled, -rng.exponential(2.0, (rows, TC)), 0).astype(np.float32),
        truncated=lengths == TC,
        texts=tuple(f"answer {index}-{i}" for i in range(rows)),
        rewards=rewards,
        reward_components={"answered": np.ones(rows, np.float32)},
    )


def leaf_at(tree, path):
    """The leaf of a tree of dicts at a path of JAX."""
    return functools.reduce(lambda node, entry: node[entry.key], path, tree)


def estimator(preset: str = "p_grpo", **changes) -> AdvantageSettings:
    """The advantage settings of a preset in these tests."""
    chosen = presets.PRESETS[preset]
    return AdvantageSettings(**{"baseline": chosen.baseline, "scale": chosen.scale, "min_count": 8.0} | changes)


@functools.cache
def kernel(settings: AdvantageSettings = estimator(), num_devices: int = 1, prompts: int = P):
    """The advantage kernel of the tests' learners; made once, because each one compiles."""
    return parallel.advantage_kernel(settings, jax.devices()[:num_devices], num_prompts=prompts)


def learner(
    directory, *, num_devices: int = 1, fsdp: int = 1, expert: int = 1, tp: int = 1, reference=None, advantage_kernel=None, preset: str = "p_grpo", model=MODEL,
    dtype=np.float32, **changes
) -> Learner:  # fmt: skip
    """A learner of the tiny model that saves in `directory`; `changes` replace fields of `SETTINGS`."""
    mesh = parallel.make_mesh(jax.devices()[:num_devices], fsdp=fsdp, expert=expert, tp=tp)
    base = functools.partial(params, "policy", dtype, model.config)
    settings = dataclasses.replace(SETTINGS, **changes)
    return Learner(
        model,
        initial_state(
            base(), reward_history.init(K, dtype), OPTIMISER, mesh,
            objective=kl_control.initial(settings.kl, K), keep_reference=settings.kl.coefficient > 0 and settings.kl.refresh > 0,
        ),
        advantage_kernel=advantage_kernel or kernel(estimator(preset), num_devices),
        settings=settings,
        reference=reference,
        load_base=base,
        mesh=mesh,
        checkpoints=Checkpoints(directory, identity={"of": "tests"}),
    )  # fmt: skip
