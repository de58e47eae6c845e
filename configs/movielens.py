"""P-GRPO trains SmolLM2-135M on the conflicting tastes of MovieLens users, on a CPU.

    ./launch/local.sh                                                     (sets up, fetches model and data, runs this, reports)
    python launch/train.py --config=configs/movielens.py --workdir=runs/movielens
    python launch/train.py --config=configs/movielens.py --workdir=runs/grpo --config.preset=grpo        (the control)
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.num_steps = 16
    config.generation.prompt_buckets = (136,)
    config.algorithm.kl_coefficient = 0.0  # a few small steps do not leave the reference; no reference pass, no second copy
    config.optimiser.learning_rate = 4.5e-5
    config.optimiser.schedule = "cosine"
    config.checkpoint.save_every = 8
    return config
