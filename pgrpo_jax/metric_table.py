"""Floor 5: the keys of a step's record: unit, healthy range, meaning. docs/metrics.md holds the same table, and a test compares them."""

import re
from typing import NamedTuple


class Metric(NamedTuple):
    """One key of a step's record; "{p}" in its name stands for the number of a preference group.

    Attributes:
        name: the key.
        unit: of its value.
        healthy: the range to hope for.
        meaning: what is measured.
        option: configuration key without which it is not recorded; "" where every record has it.
    """

    name: str
    unit: str
    healthy: str
    meaning: str
    option: str = ""


METRICS = (
    Metric("step", "updates", "rises by 1", "updates done, the key of the record"),
    Metric("wall_secs", "s", "rises", "wall time since the first start, resumes included"),
    Metric("reward", "reward", "rises, then levels off", "mean reward of the step's completions"),
    Metric("reward_std", "reward", "> 0", "population deviation of the step's rewards"),
    Metric("reward_shaped", "reward", "near reward",
           "mean reward that is trained on: shaped for length, with a KL penalty where it is in the reward"),
    Metric("worst_preference_group", "number", "not always the same", "preference group of the lowest mean reward in this step"),
    Metric("worst_reward", "reward", "rises with reward", "its mean reward"),
    Metric("gap", "reward", "does not widen", "mean reward of the best preference group minus that of the worst; none with fewer than two"),
    Metric("cvar", "reward", "rises with reward",
           "mean reward of the worst fifth of the step's prompts (each the mean of its completions)"),
    Metric("answered", "share", "rises to >= 0.9", "completions that name exactly one candidate"),
    Metric("preference_group/{p}/reward", "reward", "no preference group falls while others rise", "mean reward of its completions"),
    Metric("preference_group/{p}/count", "completions", "follows the size of the preference group", "its completions in the batch"),
    Metric("preference_group/{p}/advantage_scale", "ratio", "0.5 to 2; 0 while its history is cold",
           "sigma_G / sigma_p of Corollary 3.1, mean over its completions"),
    Metric("preference_group/{p}/bias", "deviations", "-1 to 1, falls back to 0",
           "(mu_G - mu_p) / sigma_p of Corollary 3.1, mean over its completions"),
    Metric("preference_group/{p}/signal_share", "share", "near its share of the completions",
           "its part of the sum of |advantage| over the step's completions"),
    Metric("preference_group/{p}/weight", "ratio", "1 without preference weights; 0.5 to 2 with them", "multiplier of its advantages"),
    Metric("preference_group/{p}/entropy", "nats/token", "falls slowly, as the others'", "entropy of the policy on its sampled tokens"),
    Metric("preference_group/{p}/length", "tokens", "steady", "mean length of its completions"),
    Metric("preference_group/{p}/truncated", "share", "falls towards 0", "its completions that ran out of tokens"),
    Metric("preference_group/{p}/duplicates", "share", "below 0.5",
           "its completions that repeat an earlier one of the same prompt, token by token"),
    Metric("preference_group/{p}/kl", "nats/token", "as kl", "kl of its tokens; none without a reference"),
    Metric("preference_group/{p}/kl_coefficient", "1", "follows its KL budget", "coefficient of the KL term for its completions"),
    Metric("preference_group/{p}/gradient_share", "share", "near its share of the completions; below 0 it is pushed back",
           "<g_p, g> / |g|^2, its part of the gradient along the whole gradient; adds up to 1", "metrics.gradients_every"),
    Metric("preference_group/{p}/gradient_norm_share", "share", "near its share of the completions",
           "|g_p| over the sum of the preference groups' norms", "metrics.gradients_every"),
    Metric("preference_group/{p}/history_count", "rewards", "rises", "past rewards its history holds, this step's not included"),
    Metric("preference_group/{p}/effective_history_count", "rewards", "above algorithm.min_count; levels off where memory is bounded",
           "rewards its history counts for, old and stale ones discounted"),
    Metric("preference_group/{p}/history_mean", "reward", "follows its reward, later", "mean of its history, before this step"),
    Metric("preference_group/{p}/history_std", "reward", "above algorithm.std_floor", "deviation of its history, before this step"),
    Metric("advantage_scale", "ratio", "0.5 to 2", "scale term of Corollary 3.1, mean over completions; under grpo, what p_grpo would do"),
    Metric("advantage_bias", "deviations", "-1 to 1",
           "bias-correction term of Corollary 3.1, mean over completions; under grpo, what p_grpo would do"),
    Metric("advantage_mean", "deviations", "0 under GRPO; positive while reward rises under P-GRPO", "mean advantage of the completions"),
    Metric("advantage_std", "deviations", "0.3 to 2", "deviation of the advantages"),
    Metric("gradient_cosine/min", "cosine", "above -0.5", "smallest cosine between the gradients of two preference groups",
           "metrics.gradients_every"),
    Metric("gradient_cosine/mean", "cosine", "above 0", "mean cosine over the pairs of preference groups", "metrics.gradients_every"),
    Metric("gradient_cosine/matrix", "cosine", "no row below 0", "K x K cosines, a list of lists", "metrics.gradients_every"),
    Metric("ratio", "ratio", "1 on-policy; 0.9 to 1.1 otherwise", "pi / pi_old of the sampled tokens, mean over tokens"),
    Metric("old_kl", "nats/token", "0 on-policy; below 0.05 otherwise",
           "k3 estimate of KL(old policy, policy): how far the policy moved off its data"),
    Metric("kl", "nats/token", "0 to 0.1; above 1 the policy has left the reference",
           "k3 estimate of KL(policy, reference); none without a reference"),
    Metric("kl_coefficient", "1", "steady or adapting", "coefficient of the KL term, mean over completions"),
    Metric("clip_fraction", "share", "0 on-policy; below 0.3 otherwise", "tokens whose gradient the clipped ratio removes"),
    Metric("entropy", "nats/token", "falls slowly; near 0 it has collapsed", "entropy of the policy on sampled tokens"),
    Metric("grad_norm", "norm", "> 0, no spikes of 10x", "global gradient norm before clipping"),
    Metric("loss", "objective", "about minus advantage_mean: near 0 is normal", "value of the loss; its gradient is what trains"),
    Metric("learning_rate", "1", "follows the schedule", "step size of the update"),
    Metric("length", "tokens", "steady; no drift to 1 or to the limit", "mean completion length, stop token included"),
    Metric("duplicates", "share", "below 0.5", "completions that repeat an earlier one of the same prompt, token by token"),
    Metric("truncated", "share", "falls towards 0", "completions that ran out of tokens"),
    Metric("staleness", "updates", "below staleness.accept", "mean of step - weight version over completions"),
    Metric("controller/reissued", "units", "0 without faults", "units of work issued again after a loss, since the record before"),
    Metric("controller/lease_expired", "units", "0; else raise lease_secs",
           "units whose actor took longer than lease_secs, since the record before"),
    Metric("controller/duplicates", "units", "0 without faults",
           "results that came twice or that nothing had asked for, since the record before"),
    Metric("controller/dropped", "units", "0 to a tenth of those trained on",
           "finished units that became too old, since the record before; 0 under deterministic"),
    Metric("controller/version_gap", "updates", "0 on-policy; below staleness.accept otherwise",
           "newest published version minus the oldest one the step trained on"),
    Metric("mismatch/mean", "nats/token", "below 0.01 on-policy", "mean |log-prob of sampler - log-prob of old policy|"),
    Metric("mismatch/p95", "nats/token", "below 0.1 on-policy", "95 % of |log-prob of sampler - log-prob of old policy| lie below"),
    Metric("mismatch/max", "nats/token", "below 0.5 on-policy", "largest |log-prob of sampler - log-prob of old policy|"),
    Metric("old_gap/mean", "nats/token", "0 on-policy; below 0.05 otherwise", "mean |log-prob of old policy - log-prob of learner|"),
    Metric("old_gap/p95", "nats/token", "0 on-policy; below 0.2 otherwise",
           "95 % of |log-prob of old policy - log-prob of learner| lie below"),
    Metric("old_gap/max", "nats/token", "0 on-policy; below 1 otherwise", "largest |log-prob of old policy - log-prob of learner|"),
    Metric("effective_sample_size", "share", "above 0.5", "(sum w)^2 / (n sum w^2) of the importance weights of the tokens"),
    Metric("correction/weight", "ratio", "near 1", "mean importance weight of the tokens, after the bound"),
    Metric("correction/bounded", "share", "below 0.1", "tokens whose importance weight was truncated or masked"),
    Metric("tokens_per_sec", "tokens/s", "steady after the first step", "tokens sampled for each second generating"),
    Metric("generation_secs", "s", "steady after the first step", "wall time generating and scoring"),
    Metric("update_secs", "s", "steady after the first step", "wall time of the update"),
    Metric("wait_secs", "s", "small beside the update where actors work meanwhile", "wall time the learner waited for rollouts"),
    Metric("publish_secs", "s", "small beside the update", "wall time of handing new weights to the actors"),
    Metric("checkpoint_secs", "s", "small beside the update", "wall time the loop waited for checkpoints"),
    Metric("dead_prompts", "share", "below 0.5 under GRPO", "prompts whose completions all got one reward: no signal under GRPO"),
    Metric("informative_prompts", "share", "above 0.5", "prompts of the step that entered the batch's informative set"),
    Metric("alarms", "list", "empty", "alarms that hold: key, since, value, bound, remedy (see below)"),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


def describe(key: str) -> Metric:
    """Returns the meaning of one key of a step's record.

    Args:
        key: a name such as "kl" or "preference_group/3/reward".

    Returns:
        The `Metric` that describes it.

    Raises:
        ValueError: the key has no description.
    """
    name = re.sub(r"^preference_group/\d+/", "preference_group/{p}/", key)
    if name not in _BY_NAME:
        raise ValueError(f"metric {key!r} has no description; add it to METRICS in pgrpo_jax/metric_table.py and to docs/metrics.md")
    return _BY_NAME[name]
