"""Every configuration key, its default, its unit and its source. The other configs start from `get_config()` and override.

A key is *identity* (it decides the trajectory: a checkpoint made under another value is refused, with the differences
listed) or *free* (where and how the same trajectory is computed and shown).
"""

import pathlib
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict


class Key(NamedTuple):
    """One configuration key: its default (a type where it is unset), "identity" or "free", and what it means."""

    default: Any
    kind: str
    doc: str


_ASSETS = pathlib.Path(__file__).resolve().parent.parent / ".assets"  # where launch/fetch_assets.py puts them


KEYS = {
    # what is trained, on what
    "seed": Key(0, "identity", "names every random stream of the run"),
    "preset": Key("p_grpo", "identity", "grpo | p_grpo | dr_grpo | dapo | rloo | reinforce | reinforce_pp | cispo | gspo (algorithms/presets.py)"),
    "num_steps": Key(20, "identity", "updates in the whole run (the learning-rate schedule ends there)"),
    "prompts_per_step": Key(8, "identity", "prompts consumed by one update, P"),
    "completions_per_prompt": Key(8, "identity", "completions sampled for one prompt, G; at least 2"),
    "prompts_per_work": Key(8, "identity", "prompts in one unit of generation; divides prompts_per_step"),
    "task.name": Key("movielens", "identity", "movielens | letters, or a mixture: 'movielens:3 letters:1' (pgrpo_jax/tasks)"),
    "task.data_dir": Key(str(_ASSETS / "ml-100k"), "free", "directory of the task's source files"),
    "task.num_preference_groups": Key(5, "identity", "K; of each task in a mixture"),
    "task.preference_groups": Key("", "identity", "how users are assigned: kmeans | column:NAME | rating | persona | user (docs/data.md); '' = the task's own"),
    "model.path": Key(str(_ASSETS / "smollm2-135m"), "free", "GGUF file, a directory holding one, or a Hugging Face directory (safetensors); '' = random weights from model.random"),
    "model.random.num_layers": Key(2, "identity", "used only when model.path is ''"),
    "model.random.width": Key(64, "identity", "D"),
    "model.random.mlp_width": Key(128, "identity", "F"),
    "model.random.num_heads": Key(4, "identity", "query heads"),
    "model.random.num_kv_heads": Key(2, "identity", "key/value heads; divides num_heads"),
    "model.random.context_length": Key(256, "identity", "tokens"),
    "model.dtype": Key("float32", "identity", "of activations and matmuls: float32 | bfloat16; parameters stay float32"),
    "weights.dtype": Key("float32", "identity", "of the weight versions that actors generate with: float32 | bfloat16"),
    # adapters (LoRA, arXiv:2106.09685): matrices of low rank beside a frozen model, trained, saved and sent in its place
    "lora.rank": Key(0, "identity", "r; 0 = the model itself is trained"),
    "lora.alpha": Key(16.0, "identity", "what an adapter adds is multiplied by alpha / r"),
    "lora.targets": Key("query key value output gate up down", "identity", "matrices that have an adapter"),
    "lora.per_preference_group": Key(False, "identity", "one adapter for each preference group on the one base, all in one run; else one for all"),
    # generation
    "generation.max_new_tokens": Key(16, "identity", "tokens, stop token included, Tc"),
    "generation.temperature": Key(1.0, "identity", "> 0; the learner uses the same"),
    "generation.top_k": Key(0, "identity", "0 = off; the learner renormalises on the same support"),
    "generation.top_p": Key(1.0, "identity", "(0, 1]; 1 = off; as top_k"),
    "generation.prompt_buckets": Key((64, 128, 256, 512, 1024), "identity", "padded prompt lengths, tokens, rising; one compilation each"),
    "generation.slots": Key(0, "identity", "completions an actor decodes at once; ended ones are replaced; 0 = all of a unit"),
    "generation.weights": Key("model", "identity", "how an actor stores matrices: model = in model.dtype | bfloat16 | int8 (a scale for each output)"),
    "generation.cache": Key("model", "identity", "how it stores keys and values: model = in model.dtype | bfloat16 | int8 (a scale for each token and head)"),
    # staleness (RLAX, arXiv:2512.06392), counted from 0: step - version
    "staleness.policy": Key("deterministic", "identity", "deterministic (repeats to the bit) | freshest (throughput); see schedule.py"),
    "staleness.reload": Key(1, "identity", "j: actors load new weights every j versions"),
    "staleness.accept": Key(1, "identity", "k >= j: trained on while 0 <= step - version < k; 0 = unbounded, under freshest only"),
    "staleness.lag": Key(int, "identity", "versions that generation runs behind; unset = min(k - j, j), under freshest 0"),
    # the algorithm: a preset, overridden part by part (docs/algorithm.md); unset = the preset's own value
    "algorithm.baseline": Key(str, "identity", "what a reward is compared with: none | cohort | leave_one_out | batch | history"),
    "algorithm.scale": Key(str, "identity", "what it is divided by, a deviation of: none | cohort | batch | history"),
    "algorithm.aggregation": Key(str, "identity", "completion | prompt_tokens | batch_tokens | max_length | sum"),
    "algorithm.importance": Key(str, "identity", "the preset's own weight, policy over old policy: none | ratio | sequence_ratio | clipped_ratio"),
    "algorithm.policy_term": Key(str, "identity", "ratio | sequence_ratio | log_prob"),
    "algorithm.clip_low": Key(float, "identity", "epsilon below 1 of the probability ratio"),
    "algorithm.clip_high": Key(float, "identity", "epsilon above 1"),
    "algorithm.dual_clip": Key(float, "identity", "bound of the ratio where the advantage is negative, above 1; 0 = off"),
    "algorithm.entropy_coefficient": Key(float, "identity", "bonus for entropy, per nat"),
    "algorithm.kl_estimator": Key(str, "identity", "k1 | k2 | k3"),
    "algorithm.kl_in": Key(str, "identity", "where the KL to the reference is paid: loss | reward"),
    "algorithm.kl_coefficient": Key(float, "identity", "beta of the KL to the reference; 0 loads no reference"),
    "algorithm.kl_target": Key(0.0, "identity", "KL to hold by adapting beta, nats/token; 0 = beta is fixed"),
    "algorithm.kl_horizon": Key(50.0, "identity", "updates over which beta may grow or shrink by a fifth"),
    "algorithm.kl_scope": Key("all", "identity", "whose KL is held: all | preference_group (each has its own beta and budget)"),
    "algorithm.reference_refresh": Key(0, "identity", "updates after which the policy becomes the reference; 0 = never"),
    # statistics of P-GRPO
    "algorithm.epsilon": Key(1e-6, "identity", "added to every deviation that divides a reward"),
    "algorithm.std_floor": Key(1e-3, "identity", "smallest deviation of a preference history, reward units"),
    "algorithm.deviation": Key("population", "identity", "population | sample"),
    "algorithm.min_count": Key(int, "identity", "rewards a preference history needs before it is used; unset = 4 * completions_per_prompt"),
    "algorithm.cold_start": Key("cohort", "identity", "advantage before that: cohort (GRPO's) | zero | pooled (against all histories together)"),
    "algorithm.timing": Key("before", "identity", "compare with the history before | after this step's rewards are merged into it"),
    "algorithm.blend": Key(0.0, "identity", "share of the prompt's own mean in a history baseline, [0, 1]"),
    "algorithm.shrinkage": Key(0.0, "identity", "rewards' worth of all histories together that each history is mixed with"),
    "algorithm.memory": Key("cumulative", "identity", "cumulative | ema | window | discounted"),
    "algorithm.memory_length": Key(0.0, "identity", "ema: half-life, rewards; window: batches; discounted: half-life, updates"),
    "algorithm.components": Key("", "identity", "'rating:1 answered:0.2' standardises each reward component by itself, then weights; '' = the total"),
    "algorithm.staleness_half_life": Key(0.0, "identity", "updates of staleness that halve a reward's weight in the history; 0 = off"),
    "algorithm.staleness_limit": Key(0, "identity", "rewards of this staleness or more stay out of the history; 0 = off"),
    "algorithm.arm": Key("preference", "identity", "histories by preference group, or a control: preference | pooled | placebo"),
    "algorithm.preference_weights": Key("none", "identity", "weights of preference groups in the loss: none | dro | balanced"),
    "algorithm.preference_temperature": Key(0.1, "identity", "of dro, reward units: the smaller, the more the worst preference group weighs"),
    # off-policy corrections
    "algorithm.correction": Key(str, "identity", "old policy over sampler: none | token | sequence | geometric; unset = token unless strictly on-policy"),
    "algorithm.correction_bound": Key("truncate", "identity", "truncate | mask"),
    "algorithm.correction_low": Key(0.5, "identity", "smallest weight that mask keeps"),
    "algorithm.correction_high": Key(2.0, "identity", "largest weight"),
    "algorithm.proximal": Key("current", "identity", "old policy of the ratio: current, the weights before the update (decoupled PPO), or generator"),
    # which prompts and completions are trained on
    "curation.oversample": Key(int, "identity", "prompts that a step consumes, as a multiple of prompts_per_step; unset = the preset's"),
    "curation.select": Key(str, "identity", "prompts that fill the batch: any | raw | information; unset = any without oversampling"),
    "curation.metric": Key("reward", "identity", "of select = raw: reward, or a reward component"),
    "curation.min_information": Key(1e-3, "identity", "of select = information: smallest |advantage| in a prompt"),
    "curation.overlong_buffer": Key(0, "identity", "tokens before the limit over which a penalty rises; 0 = off"),
    "curation.overlong_penalty": Key(1.0, "identity", "reward taken off at the limit"),
    "curation.mask_truncated": Key(False, "identity", "completions that ran out of tokens are not trained on"),
    "curation.difficulty": Key("", "free", "JSON of difficulty estimates (launch/record.py, docs/data.md), whose content is identity; '' = none"),
    "curation.min_mean": Key(float, "identity", "prompts with a lower estimated mean reward are left out; unset = none are"),
    "curation.max_mean": Key(float, "identity", "prompts with a higher one are left out; unset = none are"),
    "curation.min_std": Key(0.0, "identity", "prompts whose estimated deviation is lower are left out"),
    "curation.keep_unknown": Key(True, "identity", "prompts without an estimate stay"),
    "curation.order": Key("shuffled", "identity", "of an epoch: shuffled | easy_first | hard_first"),
    "curation.strata_floor": Key(0, "identity", "least prompts of every preference group in each prompts_per_step; 0 = as they come"),
    # rewards: reward functions run in processes of their own (pgrpo_jax/verifiers)
    "rewards.num_processes": Key(1, "free", "answers judged at once; 0 = in the actor's process, for pdb: no deadline, no second attempt"),
    "rewards.timeout_secs": Key(30.0, "free", "longest time for one answer"),
    "rewards.on_failure": Key("fail", "identity", "a reward failed twice: fail (end the run) | zero | drop; these two go on record"),
    # optimiser
    "optimiser.learning_rate": Key(1e-6, "identity", "peak step size of AdamW"),
    "optimiser.schedule": Key("constant", "identity", "after warm-up: constant | cosine | linear (to 0 at num_steps)"),
    "optimiser.warmup_steps": Key(2, "identity", "updates of linear warm-up"),
    "optimiser.b1": Key(0.9, "identity", "AdamW"),
    "optimiser.b2": Key(0.99, "identity", "AdamW"),
    "optimiser.eps": Key(1e-8, "identity", "AdamW"),
    "optimiser.weight_decay": Key(0.0, "identity", "AdamW, decoupled; matrices only"),
    "optimiser.clip_norm": Key(1.0, "identity", "global gradient norm, of adapters that of each by itself; 0 = off"),
    # learner
    "learner.micro_batches": Key(1, "identity", "gradient accumulation: slices of whole prompts; divides prompts_per_step"),
    "learner.micro_batch_tokens": Key(0, "identity", "tokens of a slice on a device at most, prompts once, padding too: where they would be more, there are more slices; 0 = no bound"),
    "learner.packing": Key(False, "identity", "short completions of a prompt share a row of the model: ragged updates take less time, a new mix of lengths compiles anew"),
    "learner.passes_per_batch": Key(1, "identity", "updates made from one batch of rollouts (GRPO's mu)"),
    "learner.remat": Key("off", "identity", "what the backward pass recomputes: off | keep_matmuls = all but what a layer's matmuls led to | keep_nothing = whole layers; least memory"),
    # train only, on what another run recorded
    "replay.path": Key("", "identity", "run directory or files whose rollouts are trained on, with engine = replay; '' = generate"),
    # where it runs, how often it saves and shows
    "engine": Key("inline", "free", "inline | threads | ray | replay (docs/running.md)"),
    "num_actors": Key(1, "free", "actors of the threads and ray engines; inline has one"),
    "learner.num_devices": Key(0, "free", "local devices the batch is split over; 0 = all; divides prompts_per_step / micro_batches"),
    "learner.mesh.fsdp": Key(1, "free", "devices over which parameters and optimiser are sharded, prompts too; the rest holds copies"),
    "learner.mesh.expert": Key(1, "free", "devices over which the experts of a mixture are dealt out, prompts too"),
    "learner.mesh.tp": Key(1, "free", "devices over which heads, hidden units and vocabulary are split"),
    "lease_secs": Key(900.0, "free", "seconds an actor may take for a unit before it is given up and issued again"),
    "learner.num_processes": Key(1, "free", "members of the learner gang of the ray engine, one a host"),
    "actor.tp": Key(1, "free", "devices over which an actor splits the model"),
    "ray.address": Key("", "free", "'' = a local cluster of its own; 'auto' or host:port = an existing one"),
    "ray.object_store_bytes": Key(0, "free", "shared memory of a local cluster; 0 = Ray's choice, 30 % of the memory"),
    "ray.start_secs": Key(900.0, "free", "longest time a process may take to get a node or to load the model"),
    "ray.call_secs": Key(3600.0, "free", "longest time the learner may take for an update (compilation included) or a save"),
    "ray.fetch_secs": Key(300.0, "free", "longest time weights may take to reach an actor"),
    "weights.checksums": Key(True, "free", "published weights carry checksums that actors verify"),
    "ray.learner_slice": Key("", "free", "whole TPU slice that the learner gang reserves, VERSION:TOPOLOGY (v6e:4x4); '' = none"),
    "ray.actor_slice": Key("", "free", "whole TPU slice that each actor reserves, as ray.learner_slice"),
    "ray.learner_resources": Key("", "free", "what each member of the gang reserves on its node, NAME=NUMBER,... (TPU=4); '' = nothing"),
    "ray.actor_resources": Key("", "free", "what each actor reserves on its node, as ray.learner_resources"),
    "distributed.enabled": Key(False, "free", "inline engine as one SPMD program over several processes, started alike"),
    "distributed.coordinator": Key("", "free", "host:port of process 0; '' = found by itself (TPU pods)"),
    "distributed.num_processes": Key(0, "free", "processes of that program; 0 = found by itself"),
    "distributed.process_id": Key(-1, "free", "number of this process, from 0; -1 = found by itself"),
    "checkpoint.save_every": Key(5, "free", "updates"),
    "checkpoint.keep": Key(2, "free", "committed steps kept"),
    "checkpoint.must_save_by": Key(0.0, "free", "seconds after the start of the program at which the run saves and exits 75; 0 = never"),
    "compile_cache": Key(
        "compile_cache", "free", "where JAX keeps what it compiled, so that a restart need not: relative to the workdir, absolute or a bucket; '' = off"
    ),
    "evaluation.num_prompts": Key(64, "free", "held-out prompts, one for each test user; at most as many as there are"),
    "evaluation.completions_per_prompt": Key(4, "free", "answers sampled for each"),
    "evaluation.prompts_per_work": Key(16, "free", "prompts in one unit of evaluation; divides evaluation.num_prompts"),
    "metrics.gradients_every": Key(0, "free", "updates between two measurements of each preference group's gradient (K backward passes); 0 = never"),
    "metrics.dump_batches": Key((), "free", "updates whose training batch is written to batches/ (batch_files.py), for example (1, 10)"),
    "metrics.samples_every": Key(5, "free", "updates between two tables of samples"),
    "metrics.tensorboard": Key(True, "free", "write TensorBoard files"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the default configuration, locked: an unknown key is an error."""
    tree: dict[str, Any] = {}
    for name, key in KEYS.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        # Made anew each time: a placeholder is an object that configurations would share.
        node[leaf] = config_dict.placeholder(key.default) if isinstance(key.default, type) else key.default
    return ml_collections.ConfigDict(tree).lock()


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the identity keys of a configuration as a flat {dotted name: value} dict."""
    values = {}
    for name, key in KEYS.items():
        node = config
        for part in name.split("."):
            node = node[part]
        if key.kind == "identity":
            values[name] = list(node) if isinstance(node, tuple) else node
    return values
