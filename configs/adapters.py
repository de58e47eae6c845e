"""One adapter for each preference group: SmolLM2-135M stays as it is, and five adapters learn the tastes of five clusters of MovieLens users.

    python launch/train.py --config=configs/adapters.py --workdir=runs/adapters
    python launch/train.py --config=configs/adapters.py --workdir=runs/shared --config.lora.per_preference_group=False      (one for all)

Hardware: two CPU cores, less memory than configs/movielens.py takes. Time: 6 minutes at 190 GFLOP/s (float32), 14 s an update.
Expected, on 64 held-out users with 4 answers each: answers that name exactly one candidate 0.17 -> 0.87, reward 0.13 -> 0.64, an answer earns +0.027
[-0.015, +0.071] more than a random choice (which earns 0.716; the most popular candidate 0.828): the format and little more. Sixteen updates of eight prompts
are about 26 prompts for each adapter, where configs/movielens.py has 128 for its one policy.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.num_steps = 16
    config.generation.prompt_buckets = (136,)
    config.lora.rank = 8
    config.lora.per_preference_group = True
    config.algorithm.kl_coefficient = 0.0
    config.optimiser.learning_rate = 1e-3
    config.optimiser.schedule = "cosine"
    config.checkpoint.save_every = 8
    return config
