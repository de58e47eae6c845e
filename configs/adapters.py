"""One adapter for each preference group: SmolLM2-135M stays as it is, and five adapters learn the tastes of five clusters of MovieLens users.

    python launch/train.py --config=configs/adapters.py --workdir=runs/adapters
    python launch/train.py --config=configs/adapters.py --workdir=runs/shared --config.lora.per_preference_group=False      (one for all)

Hardware: two CPU cores, 8 GB of memory. Time: TIME
Expected: EXPECTED
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
