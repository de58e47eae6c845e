"""Loss and gradient equal those of TRL 1.16.0 and Tunix 0.1.7 as tests/peers/record_losses.py recorded them, and where they differ."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from pgrpo_jax.algorithms import presets
from pgrpo_jax.algorithms.advantages import AdvantageSettings, estimate
from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.memory import init
from pgrpo_jax.algorithms.objective import Objective, policy_loss

with np.load(pathlib.Path(__file__).parents[1] / "data" / "peer_losses.npz") as stored:
    RECORDED = dict(stored)
N, T = RECORDED["mask"].shape
PROMPTS, VALID = np.repeat(np.arange(2, dtype=np.int32), N // 2), np.ones(N, bool)
BETA, CAP = 0.04, 1.3
GRPO = Objective(clip_low=0.2, clip_high=0.28)
NARROW = dataclasses.replace(GRPO, policy_term="sequence_ratio", clip_low=0.1, clip_high=0.1)
CISPO = dataclasses.replace(presets.PRESETS["cispo"].objective, aggregation="batch_tokens", clip_high=0.28)
CORRECTED = dataclasses.replace(GRPO, correction=Correction("token", "truncate", high=CAP))


def with_(**parts) -> Objective:
    return dataclasses.replace(GRPO, **parts)


# Tunix divides by the completions that are not empty, 7 of the 8; TRL, as we do, by all.
FULL = 8 / 7

# Case of the recording -> (our objective, β, factor of our loss).
SAME = {
    "trl/grpo": (GRPO, BETA, 1), "trl/bnpo": (with_(aggregation="batch_tokens"), BETA, 1),
    "trl/dapo": (presets.PRESETS["dapo"].objective, 0, 1), "trl/dr_grpo": (with_(aggregation="max_length", max_length=T), BETA, 1),
    "trl/cispo": (CISPO, 0, 1), "trl/gspo": (NARROW, 0, 1), "trl/luspo": (with_(aggregation="sum", policy_term="sequence_ratio"), 0, 1),
    "trl/dual_clip": (with_(dual_clip=1.4), BETA, 1), "trl/correction": (CORRECTED, 0, 1),
    "trl/entropy": (with_(aggregation="batch_tokens", entropy_coefficient=0.3), BETA, 1),
    "tunix/k1": (with_(kl_estimator="k1"), BETA, FULL), "tunix/k2": (with_(kl_estimator="k2"), BETA, FULL),
    "tunix/k3": (GRPO, BETA, FULL), "tunix/dual_clip": (with_(dual_clip=1.4), BETA, FULL),
    "tunix/gspo": (NARROW, 0, FULL), "tunix/token_mean": (with_(aggregation="batch_tokens"), 0, 1),
    "tunix/token_scale": (with_(aggregation="max_length", max_length=T), BETA, FULL),
    "tunix/token_sum": (with_(aggregation="sum"), BETA, FULL), "tunix/sum_norm": (with_(aggregation="sum"), BETA, FULL),
    "tunix/correction": (CORRECTED, 0, FULL),
}  # fmt: skip


def ours(objective: Objective, beta: float, advantages=RECORDED["advantages"]) -> tuple[float, np.ndarray]:
    """(loss, gradient) in float32, as the peers computed theirs."""
    old, behaviour, reference, entropies = [RECORDED[name] for name in ("old", "behaviour", "reference", "entropies")]

    def loss(log_probs):
        fixed = old, behaviour, reference, entropies, advantages, np.full(N, beta, np.float32), RECORDED["mask"], VALID, PROMPTS
        total, count, _ = policy_loss(log_probs, *fixed, objective=objective, num_prompts=2)
        return total / count

    value, gradient = jax.value_and_grad(loss)(RECORDED["log_probs"])
    return float(value), np.asarray(gradient)


def assert_equal(case: str, value: float, gradient: np.ndarray):
    np.testing.assert_allclose(value, RECORDED[f"{case}/loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, RECORDED[f"{case}/gradient"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SAME)
def test_loss_and_gradient_are_the_peers(case):
    objective, beta, factor = SAME[case]
    value, gradient = ours(objective, beta)
    assert_equal(case, factor * value, factor * gradient)


@pytest.mark.parametrize("peer, factor", [("trl", 1), ("tunix", FULL)])
def test_the_peers_correct_the_policy_term_alone(peer, factor):
    """In J as we write it the weight is in front of both terms; theirs leaves the KL as it is."""
    corrected, _ = ours(CORRECTED, BETA)
    assert abs(factor * corrected - RECORDED[f"{peer}/correction_kl/loss"]) > 1e-4
    parts = ours(CORRECTED, 0), ours(GRPO, BETA, np.zeros(N, np.float32))
    value, gradient = [factor * (a + b) for a, b in zip(*parts, strict=True)]
    assert_equal(f"{peer}/correction_kl", value, gradient)


def test_every_recorded_loss_is_compared():
    cases = {key.removesuffix("/loss") for key in RECORDED if key.endswith("/loss")}
    assert cases == set(SAME) | {"trl/correction_kl", "tunix/correction_kl"}


def test_the_inputs_reach_every_bound():
    """Clipped on both sides, beyond the dual clip and the sampler's bound, with completions of one token and of none."""
    mask, advantages = RECORDED["mask"], RECORDED["advantages"][:, None]
    ratio, weight = np.exp(RECORDED["log_probs"] - RECORDED["old"]), np.exp(RECORDED["old"] - RECORDED["behaviour"])
    for reached in ((advantages > 0) & (ratio > 1.28), (advantages < 0) & (ratio < 0.8), (advantages < 0) & (ratio > 1.4), weight > CAP):
        assert (reached & mask).any()
    assert {0, 1, T} <= set(mask.sum(axis=1))
    _, gradient = ours(NARROW, 0)
    clipped = [i for i in range(N) if mask[i].any() and not gradient[i].any()]
    assert clipped and len(clipped) < mask.any(axis=1).sum()  # GSPO clips some completions as a whole


@pytest.mark.parametrize(
    "name, settings",
    [
        ("advantages", AdvantageSettings(baseline="cohort", scale="cohort", deviation="sample", epsilon=1e-6)),
        ("rloo_advantages", AdvantageSettings(baseline="leave_one_out", scale="none")),
        ("drgrpo_advantages", AdvantageSettings(baseline="cohort", scale="none")),
    ],
)
def test_advantages_are_those_of_tunix(name, settings):
    zeros = np.zeros(N, np.int32)
    history = init(settings.memory, 1, np.float32)
    found, *_ = estimate(RECORDED["rewards"], PROMPTS, zeros, zeros, zeros, VALID, history, settings=settings, num_prompts=2)
    np.testing.assert_allclose(found, RECORDED[f"tunix/{name}"], rtol=1e-5, atol=1e-6)
