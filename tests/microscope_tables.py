"""Tables of the microscope made by hand, for the tests of what is measured on them and shown of them."""

import numpy as np

from pgrpo_jax.microscope import Table
from pgrpo_jax.structs import Prompt

TITLE = "<b>Alien & Co</b> $x$"


def table(prompts, *, num_preference_groups=None, cold=(), steps=None, extra=None):
    """A table from one (preference id, rewards, GRPO's advantages, P-GRPO's) for each prompt; each is a step of its own unless `steps` says.

    Args:
        prompts: as above.
        num_preference_groups: K.
        cold: places of prompts whose history is cold.
        steps: number of each prompt's step.
        extra: scheme -> advantages of all completions.
    """
    sizes = [len(rewards) for _, rewards, _, _ in prompts]
    place = np.repeat(np.arange(len(prompts)), sizes)
    ids = np.array([p[0] for p in prompts])
    k = num_preference_groups or ids.max() + 1
    steps = np.array(steps or range(1, len(prompts) + 1))
    numbers = sorted(set(steps.tolist()))
    joined = [np.concatenate([np.asarray(p[i], np.float64) for p in prompts]) for i in (1, 2, 3)]
    present = np.zeros((len(numbers), k), int)
    for p in place:
        present[numbers.index(steps[p]), ids[p]] += 1
    terms = np.where(present > 0, 0.5, np.nan)
    return Table(
        prompts=tuple(Prompt(f"prompt {i}", f"which film?\n{TITLE} {i}", int(p[0]), {}) for i, p in enumerate(prompts)),
        prompt=place, step=steps[place], preference=ids[place], reward=joined[0], raw=joined[0],
        answers=tuple(f"{TITLE} of {i}" for i in range(len(place))),
        advantages={"grpo": joined[1], "p_grpo": joined[2]} | (extra or {}), warm=~np.isin(place, list(cold)),
        numbers=tuple(numbers), present=present, scale=terms, bias=-terms,
    )  # fmt: skip
