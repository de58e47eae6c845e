"""Every bound of a configuration: one line with value, bound and remedy, all of them at once; and what the settings become."""

import pytest
import small_config

from pgrpo_jax import algorithm_settings, placement, settings
from pgrpo_jax.assembly import check_task, load_base, load_task
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models.tokenizer import ByteTokenizer
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.tasks import letters


def check(config, num_devices):
    settings.check(config)
    placement.check_devices(config, num_devices=num_devices)


def errors(num_devices=8, **changes):
    with pytest.raises(settings.ConfigError) as error:
        check(small_config.config(**changes), num_devices)
    return str(error.value).splitlines()


def test_the_small_configuration_runs():
    check(small_config.config(), 8)
    check(small_config.config(learner__num_devices=0), 4)


BAD = [
    ({"preset": "ppo"}, "preset is 'ppo', must be one of cispo, dapo, dr_grpo, grpo, gspo, p_grpo, reinforce, reinforce_pp, rloo: set config.preset"),
    ({"engine": "warp"}, "engine = 'warp' is unknown: use one of inline, threads, ray, replay"),
    ({"task__name": "chess"}, "task.name = 'chess' is unknown: use one of movielens, letters"),
    ({"model__dtype": "int8"}, "model.dtype = 'int8' is unknown: use one of float32, bfloat16"),
    ({"learner__micro_batch_tokens": 1}, "learner.micro_batch_tokens = 1 is below 48, what a prompt of the last of generation.prompt_buckets "
     "and its completions_per_prompt * generation.max_new_tokens may have: raise it, or set it to 0 for no bound"),
    ({"generation__weights": "int4"}, "generation.weights = 'int4' is unknown: use one of model, bfloat16, int8"),
    ({"generation__cache": ""}, "generation.cache = '' is unknown: use one of model, bfloat16, int8"),
    ({"learner__remat": "True"}, "learner.remat = 'True' is unknown: use one of off, keep_matmuls, keep_nothing"),
    ({"optimiser__schedule": "step"}, "optimiser.schedule = 'step' is unknown: use one of constant, cosine, linear"),
    ({"num_steps": 0}, "num_steps = 0 is below 1: set it to at least 1"),
    ({"completions_per_prompt": 1},
     "completions_per_prompt = 1 is below 2: one completion has nothing to be compared with; set it to at least 2"),
    ({"generation__temperature": 0.0}, "generation.temperature = 0.0 is not above 0: use generation.top_k=1 for greedy answers"),
    ({"generation__temperature": float("nan")}, "generation.temperature = nan is not above 0: use generation.top_k=1 for greedy answers"),
    ({"generation__top_p": 1.5}, "generation.top_p = 1.5 is outside (0, 1]: 1 switches it off"),
    ({"generation__prompt_buckets": (64, 32)},
     "generation.prompt_buckets = (64, 32) is not a rising list of lengths: for example (64, 128)"),
    ({"generation__prompt_buckets": ()}, "generation.prompt_buckets = () is not a rising list of lengths: for example (64, 128)"),
    ({"optimiser__learning_rate": float("inf")}, "optimiser.learning_rate = inf is not above 0: 1e-6 to 1e-4 are usual"),
    ({"optimiser__b1": 1.0}, "optimiser.b1 = 1.0 is outside [0, 1): 0.9 is usual"),
    ({"optimiser__b2": -0.1}, "optimiser.b2 = -0.1 is outside [0, 1): 0.99 is usual"),
    ({"optimiser__eps": 0.0}, "optimiser.eps = 0.0 is not above 0: AdamW would divide by 0; 1e-8 is usual"),
    ({"algorithm__clip_low": 2.0}, "clip_low is 2.0, must be in (0, 1]: set config.algorithm.clip_low"),
    ({"algorithm__std_floor": float("nan")}, "algorithm.std_floor = nan is not at least 0 and finite: set it within"),
    ({"algorithm__epsilon": 0.0, "algorithm__std_floor": 0.0},
     "algorithm.epsilon + algorithm.std_floor = 0.0 is 0: a preference history of equal rewards would divide by 0; set one above 0"),
    ({"staleness__reload": 2},
     "staleness.accept = 1 is below staleness.reload = 2: it would need versions of the future; set accept >= reload"),
    ({"staleness__lag": 1}, "staleness.lag = 1 is outside [0, accept - reload = 0]: rollouts would be too old to accept"),
    ({"staleness__policy": "newest"}, "staleness.policy = 'newest' is unknown: use one of deterministic, freshest"),
    ({"staleness__accept": 0},
     "staleness.accept = 0 (no bound) can not be scheduled: set accept >= reload, or staleness.policy to 'freshest'"),
    ({"staleness__policy": "freshest", "staleness__accept": 4, "staleness__lag": 2},
     "staleness.lag = 2 has no place in staleness.policy = 'freshest': leave it unset"),
    ({"rewards__on_failure": "ignore"}, "rewards.on_failure = 'ignore' is unknown: use one of fail, zero, drop"),
    ({"rewards__timeout_secs": 0.0}, "rewards.timeout_secs = 0.0 is not above 0: every reward would fail; 30 is usual"),
    ({"rewards__timeout_secs": float("inf")}, "rewards.timeout_secs = inf is not above 0: every reward would fail; 30 is usual"),
    ({"lease_secs": 0.0},
     "lease_secs = 0.0 is not above 0: every unit would be given up at once; several times what a unit takes is usual"),
    ({"lease_secs": float("nan")},
     "lease_secs = nan is not above 0: every unit would be given up at once; several times what a unit takes is usual"),
    ({"prompts_per_work": 3}, "prompts_per_step = 4 is not divisible by prompts_per_work = 3: change one of them"),
    ({"learner__micro_batches": 3}, "prompts_per_step = 4 is not divisible by learner.micro_batches = 3: change one of them"),
    ({"learner__num_devices": 3}, "prompts_per_step / learner.micro_batches = 4 is not divisible by "
     "the learner's devices (learner.num_devices, 0 = all) = 3: change one of them"),
    ({"learner__num_devices": 0}, "prompts_per_step / learner.micro_batches = 4 is not divisible by "
     "the learner's devices (learner.num_devices, 0 = all) = 8: change one of them"),
    ({"learner__num_devices": 16, "prompts_per_step": 16},
     "learner.num_devices = 16 is more than the 8 devices there are: lower it, or 0 for all"),
    ({"learner__mesh__expert": 3, "learner__num_devices": 4}, "the learner's devices (learner.num_devices, 0 = all) = 4 is not divisible by "
     "learner.mesh.fsdp * learner.mesh.expert * learner.mesh.tp = 3: change one of them"),
    ({"evaluation__prompts_per_work": 3},
     "evaluation.num_prompts = 8 is not divisible by evaluation.prompts_per_work = 3: change one of them"),
    ({"model__random__num_heads": 0}, "model.random.num_heads = 0 is below 1: set it to at least 1"),
    ({"model__random__num_kv_heads": 3},
     "num_heads is 2, must be a multiple of num_kv_heads 3: each key/value head serves the same number of query heads"),
]  # fmt: skip


@pytest.mark.parametrize("changes, line", BAD, ids=[",".join(changes) for changes, _ in BAD])
def test_one_line_for_one_error(changes, line):
    assert errors(**changes) == [line]


def test_the_learner_is_told_how_a_batch_is_cut_and_packed():
    told = [
        settings.learner_settings(small_config.config(**changes), ByteTokenizer())
        for changes in ({}, {"learner__packing": True, "learner__micro_batch_tokens": 50, "learner__micro_batches": 2})
    ]
    assert [(s.packing, s.micro_batch_tokens, s.micro_batches) for s in told] == [(False, 0, 1), (True, 50, 2)]


@pytest.mark.parametrize("key", sorted(settings._AT_LEAST))
def test_every_lower_bound_is_checked(key):
    least = settings._AT_LEAST[key]
    lines = errors(**{key.replace(".", "__"): least - 1})
    about = [line for line in lines if line.startswith(f"{key} = {least - 1}")]
    assert any(line.endswith(f" is below {least}: set it to at least {least}") for line in about)


def test_every_error_is_listed_at_once():
    lines = errors(preset="ppo", prompts_per_work=3, completions_per_prompt=1, staleness__reload=2, engine="warp", learner__micro_batches=0)
    parts = ["preset is 'ppo'", "prompts_per_work = 3", "completions_per_prompt = 1", "staleness.reload = 2", "engine = 'warp'"]
    for part in [*parts, "micro_batches = 0"]:
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 6


def test_prompts_must_fit():
    task = load_task(small_config.config())
    with pytest.raises(ValueError, match="^prompt of 23 tokens is longer than the largest bucket of 16: .*generation.prompt_buckets$"):
        load_base(small_config.config(generation__prompt_buckets=(8, 16)), task)
    with pytest.raises(ValueError, match=r"^prompts of 23 tokens \(bucket 40\) and answers of .* = 4 exceed .* of 43 tokens: "):
        load_base(small_config.config(model__random__context_length=43), task)
    load_base(small_config.config(model__random__context_length=44), task)


def test_a_dense_model_has_no_experts_to_deal_out():
    config = small_config.config(learner__mesh__expert=2)
    with pytest.raises(ValueError, match=r"^learner.mesh.expert = 2, but the model is dense, it has no experts to deal out: set it to 1, [^\n]*$"):
        load_base(config, load_task(config))


@pytest.mark.parametrize("path, error", [("nothing.gguf", FileNotFoundError), ("empty.gguf", ValueError)])
def test_a_model_file_that_can_not_be_read(path, error, tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(error, match=str(tmp_path / path)) as raised:
        load_base(small_config.config(model__path=str(tmp_path / path)), load_task(small_config.config()))
    assert len(str(raised.value).splitlines()) == 1


def task(**changes):
    made = vars(letters.load("", seed=0, num_preference_groups=3)) | changes
    return letters.Letters(**made)


def test_a_task_is_checked_before_the_model_is_loaded():
    check_task(task(), num_held_out=128)
    train, test = (task().split_prompts[split] for split in ("train", "test"))
    for split, empty in (("train", {"train": (), "test": test}), ("test", {"train": train, "test": ()})):
        with pytest.raises(ValueError, match=f"^the {split} split has 0 prompts, at least 1 is needed: check the files in task.data_dir$"):
            check_task(task(split_prompts=empty), num_held_out=1)
    with pytest.raises(ValueError, match=r"^prompt \S+ has preference id 2, outside \[0, 2\): .*set task.num_preference_groups$"):
        check_task(task(num_preference_groups=2), num_held_out=1)
    with pytest.raises(ValueError, match="^evaluation.num_prompts = 129 is above the task's 128 held-out prompts: lower it"):
        check_task(task(), num_held_out=129)


def test_a_task_without_its_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_task(small_config.config(task__name="movielens", task__data_dir=str(tmp_path / "nothing")))


def test_what_the_settings_become():
    config = small_config.config(
        algorithm__clip_high=0.5, preset="grpo", learner__passes_per_batch=3, optimiser__warmup_steps=2, generation__top_k=7,
        generation__temperature=0.5, staleness__accept=3, generation__prompt_buckets=(8, 40), generation__slots=24,
        generation__weights="int8", generation__cache="bfloat16",
    )  # fmt: skip
    learner = settings.learner_settings(config, ByteTokenizer())
    assert (learner.loss.objective.clip_low, learner.loss.objective.clip_high, learner.kl.coefficient) == (0.2, 0.5, 0.0)
    assert learner.loss.support == Support(temperature=0.5, top_k=7, top_p=1.0)  # the sampler's own
    assert settings.generation_settings(config, ByteTokenizer()).support == learner.loss.support
    assert (learner.optimiser.warmup_steps, learner.optimiser.num_updates) == (2 * 3, 12 * 3)  # in optimiser steps
    assert learner.schedule == Schedule(reload=1, accept=3, lag=1, policy="deterministic")
    unbounded = small_config.config(staleness__policy="freshest", staleness__accept=0, staleness__reload=4)
    check(unbounded, 8)
    assert settings.schedule(unbounded) == Schedule(reload=4, accept=0, lag=0, policy="freshest")
    assert settings.generation_settings(config, ByteTokenizer()).prompt_buckets == (8, 40)
    generation = settings.generation_settings(config, ByteTokenizer())
    assert (generation.slots, generation.weights, generation.cache) == (24, "int8", "bfloat16")
    estimator = algorithm_settings.advantage_settings(config)
    assert (estimator.baseline, estimator.scale, estimator.epsilon, estimator.std_floor, estimator.min_count) == ("cohort", "cohort", 1e-6, 1e-3, 8)
    assert algorithm_settings.advantage_settings(small_config.config(algorithm__min_count=0)).min_count == 0
    assert learner.loss.objective.correction.level == "token", "on by default off-policy"
    assert settings.learner_settings(small_config.config(), ByteTokenizer()).loss.objective.correction.level == "none"
    assert settings.work_per_step(small_config.config(preset="dapo")) == 2 * settings.work_per_step(config) == 4
