"""configs/smoke.py made smaller still: a whole run takes seconds, most of them compiling."""

from configs import base, smoke

SMALL = {
    "num_steps": 12,
    "prompts_per_step": 4,
    "prompts_per_work": 2,
    "completions_per_prompt": 2,
    "model.random.num_layers": 1,
    "model.random.width": 16,
    "model.random.mlp_width": 16,
    "model.random.num_heads": 2,
    "model.random.num_kv_heads": 1,
    "generation.max_new_tokens": 4,
    "generation.prompt_buckets": (40,),
    "rewards.num_processes": 0,
    "learner.num_devices": 1,
    "checkpoint.save_every": 2,
    "metrics.samples_every": 4,
    "metrics.tensorboard": False,
    "evaluation.num_prompts": 8,
    "evaluation.completions_per_prompt": 2,
    "evaluation.prompts_per_work": 4,
}


def overrides(**changes):
    """{dotted key: value} of the small run; dots in the names of the changes are written "__"."""
    return SMALL | {name.replace("__", "."): value for name, value in changes.items()}


def config(**changes):
    """The configuration of the small run."""
    made = smoke.get_config()
    for name, value in overrides(**changes).items():
        *parents, leaf = name.split(".")
        node = made
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return made


def identity(**changes):
    """Its identity keys."""
    return base.identity(config(**changes))
