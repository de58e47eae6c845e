"""A tiny random model on the toy task: the whole program in seconds, for tests and for debugging.

    python launch/train.py --config=configs/smoke.py --workdir=/tmp/smoke

Hardware: any CPU. Time: 14 s from a cold start on two cores, most of it compilation. Expected: the held-out reward rises from 0.23 to
0.58, nearly all of it in preference group 0, whose letters the policy finds first.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.task.name = "letters"
    config.task.num_preference_groups = 3
    config.model.path = ""
    config.num_steps = 30
    config.prompts_per_step = 8
    config.prompts_per_work = 4
    config.completions_per_prompt = 8
    config.generation.max_new_tokens = 8
    config.generation.prompt_buckets = (32, 40)
    config.algorithm.kl_coefficient = 0.0
    config.optimiser.learning_rate = 3e-3
    config.evaluation.num_prompts = 32
    config.evaluation.prompts_per_work = 4  # with 8 completions each, as in training: one compilation serves both
    config.evaluation.completions_per_prompt = 8
    config.checkpoint.save_every = 10
    config.metrics.samples_every = 10
    return config
