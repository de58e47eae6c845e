"""Small worlds and arms that the tests of the laboratory share, so that they share their compilations too."""

import numpy as np

from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.laboratory import training

K, X, A = 3, 3, 4
BUDGET = training.Budget(num_steps=40, early_step=8, prompts_per_step=8, completions_per_prompt=4, num_contexts=X, num_actions=A)
SEEDS = np.arange(6)
GRPO = training.Arm(settings=AdvantageSettings(baseline="cohort", scale="cohort"))
P_GRPO = training.Arm(settings=AdvantageSettings(baseline="history", scale="history", min_count=16.0))


def world(**changed):
    values = {"shares": (0.5, 0.35, 0.15), "offsets": (0.0,) * K, "scales": (1.0,) * K, "noise": (0.2,) * K}
    return values | {"disagreement": 0.75, "visibility": 1.0, "difficulty": 0.0, "exponent": 1.0, "binary": 0.0} | changed


WORLDS = {
    "base": world(),
    "rated otherwise": world(offsets=(0.0, 0.0, -1.0), scales=(1.0, 1.0, 0.5)),
    "same": world(disagreement=0.0, visibility=0.0),
}
