"""Floor 5: sampling: a policy answers prompts that a person writes, or held-out prompts of the task, which are judged as well.

Nothing depends on the clock: the random stream is named by the run's seed and the prompt's text, so the same question gets the same answers again, and
the untrained policy, asked the same, draws from the same stream.
"""

import contextlib
import dataclasses
import math
import sys
import unicodedata
from typing import Any, Callable, Iterable, Mapping, Sequence
import zlib

import jax
import numpy as np
from etils import epath

from pgrpo_jax import assembly, policies, settings
from pgrpo_jax.generation import engine as generation
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import lora
from pgrpo_jax.models.tokenizer import Tokenizer
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.structs import Prompt, Reward
from pgrpo_jax.tasks import Task

_CUT = " […]"  # shown behind an answer that ran out of tokens


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked of whom, and how it is sampled.

    Attributes:
        preference_group: number or name; whose held-out prompts, and whose answers where preference groups have policies of their own. "" = anyone's.
        prompt: answered instead of lines; None = lines, or held-out prompts.
        held_out: held-out prompts to answer and judge; 0 = none.
        num_completions: answers to each prompt.
        temperature: 0 = always the most probable token; None = the run's.
        max_new_tokens: tokens of an answer, stop token included; None = the run's.
        base: the untrained policy answers.
    """

    preference_group: str = ""
    prompt: str | None = None
    held_out: int = 0
    num_completions: int = 1
    temperature: float | None = None
    max_new_tokens: int | None = None
    base: bool = False


@dataclasses.dataclass(frozen=True)
class Respondent:
    """A policy that answers one prompt at a time.

    Attributes:
        model: the network.
        weights: its parameters, on an actor's devices.
        tokenizer: its tokenizer and chat template.
        settings: what is generated; the last of its buckets is the longest prompt.
        seed: names the random streams, together with the prompts.
    """

    model: Transformer
    weights: Any
    tokenizer: Tokenizer
    settings: generation.GenerationSettings
    seed: int

    def read(self, text: str) -> list[int]:
        """Returns the tokens of a prompt in the model's chat format.

        Raises:
            ValueError: it is no text that the template takes, or too long.
        """
        ids, most, answer = self.tokenizer.render_chat(text), self.settings.prompt_buckets[-1], self.settings.max_new_tokens
        if len(ids) > most:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, at most {most} leave room for an answer of {answer} in the model's context of {most + answer}: "
                "shorten it, or lower --max_new_tokens"
            )
        return ids

    def answers(self, text: str, ids: Sequence[int], count: int, *, adapter: int = 0) -> list[tuple[str, bool]]:
        """Samples answers.

        Args:
            text: the prompt, which names the random stream.
            ids: of `read`.
            count: answers wanted.
            adapter: which of the model's adapters answers.

        Returns:
            (answer, whether it ran out of tokens) each.
        """
        prompts, lengths = generation.pad_prompts([ids], buckets=self.settings.prompt_buckets, pad_id=self.settings.pad_id)
        stream = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(b"sample"))
        key = jax.random.fold_in(stream, zlib.crc32(text.encode()))
        made = generation.generate(
            self.model, self.weights, prompts, lengths, key, completions_per_prompt=count, settings=self.settings, adapters=np.array([adapter])
        )
        texts = [self.tokenizer.decode(row[:n]) for row, n in zip(made.tokens, made.lengths, strict=True)]
        return list(zip(texts, made.truncated.tolist(), strict=True))


def sample(
    config: Any, *, identity: Mapping[str, Any], workdir: epath.PathLike | None, options: Options, lines: Iterable[str],
    say: Callable[[str], None] = print, note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> int:  # fmt: skip
    """Answers prompts with the newest committed checkpoint of a run, which may still be training and is only read, or with the untrained policy.

    Args:
        config: every key of configs/base.py.
        identity: its identity keys, flat.
        workdir: the run directory; None = the untrained policy.
        options: what is asked of whom.
        lines: a prompt each, read as they are needed; blank ones are passed over.
        say: shows answers.
        note: shows what is no answer.

    Returns:
        The exit status: 0, or 1 where a prompt could not be answered, which was said.

    Raises:
        ValueError: the configuration, the options, the checkpoint or the model can not be used.
        FileNotFoundError: there is no committed checkpoint, or no model.
    """
    settings.check(config)
    if options.prompt is not None and options.held_out:
        raise ValueError(f"--prompt and --held_out={options.held_out} are both given: choose one")
    task = assembly.load_task(config)
    preference_id = policies.find_preference_group(task, options.preference_group)
    asked = held_out(task, preference_id, options.held_out)
    adapters = [policies.adapter_of(config, task, prompt.preference_id) for prompt in asked]
    adapter = 0 if asked else policies.adapter_of(config, task, preference_id)
    respondent = _respondent(config, identity, workdir, options, task, note)
    if asked:
        _answer_held_out(config, respondent, task, list(zip(asked, adapters, strict=True)), options.num_completions, say)
        return 0
    failed = False
    for text in (line for line in lines if line.strip()) if options.prompt is None else [options.prompt]:
        try:
            ids = respondent.read(text)
        except ValueError as error:
            note(f"error: {error}")
            failed = True
            continue
        for answer in respondent.answers(text, ids, options.num_completions, adapter=adapter):
            say(_shown(*answer))
    return int(failed)


def held_out(task: Task, preference_id: int | None, count: int) -> list[Prompt]:
    """Returns the first held-out prompts of a preference group, or of all.

    Args:
        task: has them.
        preference_id: whose; None = anyone's.
        count: how many.

    Raises:
        ValueError: there are fewer.
    """
    found = [p for p in task.prompts("test", 0, task.num_prompts("test")) if preference_id in (None, p.preference_id)]
    if count > len(found):
        whose = "all preference groups" if preference_id is None else f"preference group {preference_id}"
        raise ValueError(f"--held_out={count} is above the {len(found)} held-out prompts of {whose}: lower it")
    return found[:count]


def _respondent(
    config: Any, identity: Mapping[str, Any], workdir: epath.PathLike | None, options: Options, task: Task, note: Callable[[str], None]
) -> Respondent:  # fmt: skip
    if options.base or workdir is None:
        base = assembly.load_base(config, task)
        params, who = lora.joined(base.frozen(), base.trainable()), f"the untrained policy ({config.model.path or 'random'})"
    else:
        saved = policies.restore(config, identity=identity, run=workdir, task=task)
        base, params = saved.base, policies.policy_of(saved.learner)
        who = f"step {saved.learner.step} of {workdir}"
    wanted = _wanted(settings.generation_settings(config, base.tokenizer), options, context_length=base.model.config.context_length)
    note(f"{who}, temperature {wanted.support.temperature:g}" if wanted.support.top_k != 1 else f"{who}, greedy")
    return Respondent(base.model, policies.published(config, base, params), base.tokenizer, wanted, config.seed)


def _wanted(usual: generation.GenerationSettings, options: Options, *, context_length: int) -> generation.GenerationSettings:
    """The run's settings with what was asked for, and prompts as long as the context takes."""
    answer, support = options.max_new_tokens or usual.max_new_tokens, usual.support
    if not 1 <= answer < context_length:
        raise ValueError(f"--max_new_tokens={answer} is outside [1, {context_length}), the model's context less a prompt: lower it")
    if options.temperature is not None:
        if not 0 <= options.temperature < math.inf:
            raise ValueError(f"--temperature={options.temperature} is outside [0, inf): 0 is greedy, 1 the model's own probabilities")
        greedy = options.temperature == 0
        support = Support(top_k=1) if greedy else dataclasses.replace(support, temperature=options.temperature)
    longest, buckets = context_length - answer, list(usual.prompt_buckets)
    while buckets[-1] < longest:
        buckets.append(2 * buckets[-1])
    fitting = tuple(bucket for bucket in buckets if bucket < longest)
    return dataclasses.replace(usual, max_new_tokens=answer, support=support, prompt_buckets=(*fitting, longest))


def _answer_held_out(config: Any, respondent: Respondent, task: Task, asked: Sequence[tuple[Prompt, int]], count: int, say: Callable[[str], None]) -> None:
    with contextlib.closing(assembly.make_rewards(config)) as rewards:
        for prompt, adapter in asked:
            name = task.preference_group_names[prompt.preference_id]
            say(f"{prompt.prompt_id}, preference group {prompt.preference_id} ({name})\n{_shown(prompt.text)}")
            answers = respondent.answers(prompt.text, respondent.read(prompt.text), count, adapter=adapter)
            verdicts, _ = rewards.judge([prompt] * count, [text for text, _ in answers])
            for answer, verdict in zip(answers, verdicts, strict=True):
                say(f"{_total(verdict):>6}  {_shown(*answer)}")
            say("")


def _total(verdict: Reward | None) -> str:
    return "failed" if verdict is None else f"{verdict.total:.2f}"


def _shown(text: str, cut: bool = False) -> str:
    """A text without control characters, which could steer a terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else " " for c in text) + _CUT * cut
