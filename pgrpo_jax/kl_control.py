"""Floor 2: the KL to the reference policy as a budget: who pays how much, and when the reference moves.

Its state is part of `TrainState.objective`, so a resumed run goes on with the same coefficients and the same reference:

    "kl_coefficients"  [K] float32, beta of each preference group; present where a KL is paid at all
    "reference"        the reference's parameters; present only where it is refreshed, else it is the untrained policy, which is not state
"""

import dataclasses
from typing import Any, Mapping

import jax
import numpy as np

from pgrpo_jax.algorithms import regularisers

SCOPES = ("all", "preference_group")


@dataclasses.dataclass(frozen=True)
class KLControl:
    """How the KL is held.

    Attributes:
        coefficient: beta at the start; 0 = no KL, no reference.
        target: KL to hold, nats/token; 0 = beta stays.
        horizon: updates over which beta may change by a fifth.
        scope: "all": one beta, adapted to the KL over all tokens; "preference_group": each has its own, adapted to its own.
        refresh: updates after which the policy becomes the reference; 0 = never.
    """

    coefficient: float = 0.0
    target: float = 0.0
    horizon: float = 50.0
    scope: str = "all"
    refresh: int = 0

    def refreshes(self, step: int) -> bool:
        """Returns whether the policy becomes the reference after `step` updates."""
        return self.coefficient > 0 and self.refresh > 0 and step % self.refresh == 0


def initial(control: KLControl, num_preference_groups: int) -> dict[str, Any]:
    """Returns the part of `TrainState.objective` that the KL needs before the first update, on the host; without a reference."""
    return {"kl_coefficients": np.full(num_preference_groups, control.coefficient, np.float32)} if control.coefficient > 0 else {}


def adapted(control: KLControl, coefficients: np.ndarray, measured: Mapping[str, Any]) -> np.ndarray:
    """Returns the coefficients after an update (Ziegler et al. 2019, arXiv:1909.08593, eq. 5).

    Args:
        control: target, horizon and scope.
        coefficients: [K] float32.
        measured: of `update.update`: "kl", nats/token over all tokens, and "by_preference/kl" [K], NaN where a preference group had none.

    Returns:
        [K] float32; a preference group that was not there keeps its own.
    """
    if control.target == 0:
        return coefficients
    everyone = np.full(len(coefficients), measured["kl"])
    kl = everyone if control.scope == "all" else np.asarray(measured["by_preference/kl"], np.float64)
    target = np.full(len(coefficients), control.target, np.float32)
    return np.asarray(jax.device_get(regularisers.adapt(coefficients, kl.astype(np.float32), target, control.horizon)))
