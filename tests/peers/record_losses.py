"""Records what TRL's and Tunix's loss functions return on seeded random log-probs, for tests/algorithms/test_peer_losses.py.

Run by hand, each in an environment of its own, outside the repository; the file is written over, case by case:

    python3.11 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0
    trl/bin/python tests/peers/record_losses.py trl tests/data/peer_losses.npz
    python3.11 -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
    tunix/bin/python tests/peers/record_losses.py tunix tests/data/peer_losses.npz

The peers' own code runs unchanged. Only where it would call a language model does it get the log-probs of the inputs: in TRL the method
`_get_per_token_logps_and_entropies`, in Tunix the function `compute_per_token_logps`. The weights of a sampler's correction are computed
here by the peers' formula, since both make them inside of generation.
"""

import collections
import pathlib
import sys
import types

import numpy as np

LENGTHS = [6, 1, 3, 6, 2, 5, 4, 0]  # four completions for each of two prompts; the last is empty
LONGEST = 6
BETA, LOW, HIGH, CAP = 0.04, 0.2, 0.28, 1.3

TRL = {
    "grpo": {}, "bnpo": {"loss_type": "bnpo"}, "dapo": {"loss_type": "dapo", "beta": 0.0}, "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1 + HIGH},
    "gspo": {"importance_sampling_level": "sequence", "beta": 0.0, "epsilon_low": 0.1, "epsilon_high": 0.1},
    "luspo": {"importance_sampling_level": "sequence", "loss_type": "luspo", "beta": 0.0},
    "dual_clip": {"delta": 1.4}, "correction": {"use_vllm": True, "beta": 0.0}, "correction_kl": {"use_vllm": True},
    "entropy": {"loss_type": "bnpo", "entropy_coef": 0.3},
}  # fmt: skip
TUNIX = {
    "k1": {"kl_loss_mode": "kl"}, "k2": {"kl_loss_mode": "mse_kl"}, "k3": {}, "dual_clip": {"epsilon_c": 1.4},
    "gspo": {"loss_algo": "gspo-token", "beta": 0.0, "epsilon": 0.1, "epsilon_high": 0.1},
    "token_mean": {"loss_agg_mode": "token-mean", "beta": 0.0}, "token_scale": {"loss_agg_mode": "sequence-mean-token-scale"},
    "token_sum": {"loss_agg_mode": "seq-mean-token-sum"}, "sum_norm": {"loss_agg_mode": "sequence-mean-token-sum-norm"},
    "correction": {"weights": True, "beta": 0.0}, "correction_kl": {"weights": True},
}  # fmt: skip


def inputs() -> dict[str, np.ndarray]:
    """Log-probs whose ratios lie on both sides of every bound; finite in the padding, which both peers multiply by 0."""
    rng = np.random.default_rng(11)
    shape = len(LENGTHS), LONGEST
    log_probs = -rng.exponential(1.0, shape)
    drawn = {"log_probs": log_probs} | {name: log_probs + rng.normal(0, 0.4, shape) for name in ("old", "behaviour", "reference")}
    drawn |= {"entropies": rng.random(shape), "advantages": rng.normal(0, 1, len(LENGTHS)), "rewards": rng.random(len(LENGTHS))}
    return {name: x.astype(np.float32) for name, x in drawn.items()} | {"mask": np.arange(LONGEST)[None, :] < np.array(LENGTHS)[:, None]}


def record_trl(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`GRPOTrainer._compute_loss`, called on an object that carries the attributes it reads."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    recorded = {}
    for name, options in TRL.items():
        tensors = {key: torch.tensor(value) for key, value in x.items()}
        log_probs = tensors["log_probs"].requires_grad_()
        mask = tensors["mask"].int()
        entropy_coef = options.get("entropy_coef", 0.0)
        trainer = types.SimpleNamespace(
            args=types.SimpleNamespace(delta=options.get("delta"), use_bias_correction_kl=False, steps_per_generation=1),
            model=types.SimpleNamespace(training=True),
            accelerator=types.SimpleNamespace(num_processes=1, gather=lambda y: y, reduce=lambda y, reduction: y, sync_gradients=True),
            current_gradient_accumulation_steps=1, max_completion_length=LONGEST, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            aux_loss_enabled=False, vllm_importance_sampling_correction=True, use_adaptive_entropy=False, entropy_coef=entropy_coef,
            _entropy_bonus_enabled=entropy_coef != 0, _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, tensors["entropies"], None),
            **({"loss_type": "grpo", "importance_sampling_level": "token", "beta": BETA, "epsilon_low": LOW, "epsilon_high": HIGH}
               | {"use_vllm": False} | {key: value for key, value in options.items() if key not in ("delta", "entropy_coef")}),
        )  # fmt: skip
        ratio = torch.exp((tensors["old"] - tensors["behaviour"]) * mask).clamp(max=CAP)
        batch = {
            "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
            "advantages": tensors["advantages"], "old_per_token_logps": tensors["old"], "ref_per_token_logps": tensors["reference"],
            "importance_sampling_ratio": ratio, "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        loss = GRPOTrainer._compute_loss(trainer, None, batch)
        loss.backward()
        recorded |= {f"trl/{name}/loss": loss.detach().numpy(), f"trl/{name}/gradient": log_probs.grad.numpy()}
    return recorded


def record_tunix(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`grpo_loss_fn` on a model whose one parameter is the log-probs, and the three estimators of advantages."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.rl import algo_core, common

    class LogProbs(nnx.Module):
        """A model that has been asked already."""

        def __init__(self):
            self.log_probs = nnx.Param(jnp.asarray(x["log_probs"]))

    def asked(graphdef, state, **_):
        return nnx.merge(graphdef, state).log_probs[...], jnp.zeros((*x["mask"].shape, 2))

    common.compute_per_token_logps = asked
    mask = jnp.asarray(x["mask"], jnp.float32)
    weights = jnp.minimum(jnp.exp(x["old"] - x["behaviour"]), CAP)
    recorded = {}
    for name, options in TUNIX.items():
        defaults = {"beta": BETA, "epsilon": LOW, "epsilon_high": HIGH, "loss_algo": "grpo", "loss_agg_mode": "sequence-mean-token-mean"}
        config = types.SimpleNamespace(**(defaults | {"kl_loss_mode": "low_var_kl", "kl_clamp_value": None, "temperature": 1.0} | options))
        example = types.SimpleNamespace(
            prompt_ids=None, completion_ids=jnp.ones(mask.shape, jnp.int32), completion_mask=mask, advantages=jnp.asarray(x["advantages"]),
            old_per_token_logps=jnp.asarray(x["old"]), ref_per_token_logps=jnp.asarray(x["reference"]),
            sampler_is_weights=weights if options.get("weights") else None,
        )  # fmt: skip
        compute = nnx.value_and_grad(lambda model: algo_core.grpo_loss_fn(model, example, config, 0, 1)[0])
        loss, gradient = compute(LogProbs())
        recorded |= {f"tunix/{name}/loss": np.asarray(loss), f"tunix/{name}/gradient": np.asarray(jax.tree.leaves(gradient)[0])}
    for name in ("advantages", "rloo_advantages", "drgrpo_advantages"):
        recorded[f"tunix/{name}"] = np.asarray(getattr(algo_core, f"compute_{name}")(x["rewards"], 4))
    return recorded


def main() -> None:
    peer, path = sys.argv[1], pathlib.Path(sys.argv[2])
    kept = {}
    if path.exists():
        with np.load(path) as stored:
            kept = {key: stored[key] for key in stored if not key.startswith(f"{peer}/")}
    x = inputs()
    recorded = {"trl": record_trl, "tunix": record_tunix}[peer](x)
    np.savez_compressed(path, **(kept | x | recorded))
    print(f"{path}: {len(recorded)} arrays of {peer}")


if __name__ == "__main__":
    main()
