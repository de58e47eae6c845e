"""Asking a policy: greedy answers against a loop over whole forward passes, held-out prompts against the task, and what a person may type."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_config

from pgrpo_jax import assembly, policies, sample
from pgrpo_jax.generation.engine import GenerationSettings
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer
from pgrpo_jax.preemption import Stop
from pgrpo_jax.sample import Options
from pgrpo_jax.tasks import letters
from pgrpo_jax.train import train

CHANGES = {"num_steps": 3, "optimiser__learning_rate": 0.05}  # far from where it began


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The directory of a finished run."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert train(small_config.config(**CHANGES), identity=small_config.identity(**CHANGES), workdir=path, stop=Stop()) == 0
    return path


def ask(workdir, lines=(), **options):
    """(exit status, what was said, what was noted) of one call."""
    said, noted = [], []
    config, identity = small_config.config(**CHANGES), small_config.identity(**CHANGES)
    status = sample.sample(config, identity=identity, workdir=workdir, options=Options(**options), lines=lines, say=said.append, note=noted.append)
    return status, said, noted


def greedy(params, text, count):
    """The most probable tokens after a prompt of bytes, one whole forward pass for each; what they spell."""
    config = small_config.config(**CHANGES)
    model = assembly.load_base(config, assembly.load_task(config)).model
    ids = [256, *text.encode(), 10]

    @jax.jit
    def best(tokens):  # what follows each token; none looks ahead, so what lies behind the end does not matter
        hidden, _ = transformer.forward(model, params, tokens, np.arange(40, dtype=np.int32)[None])
        return jnp.argmax(transformer.logits(params, hidden, 0.0)[0], axis=-1)

    while count and ids[-1] != 257:
        ids.append(int(best(np.array([ids + [0] * (40 - len(ids))], np.int32))[len(ids) - 1]))
        count -= 1
    answer = bytes(token for token in ids[len(text.encode()) + 2 :] if token < 256).decode("utf-8", errors="replace")
    return sample._shown(answer, ids[-1] != 257)


def test_the_checkpoint_answers_and_the_untrained_policy_where_it_is_asked(workdir):
    config, identity = small_config.config(**CHANGES), small_config.identity(**CHANGES)
    saved = policies.restore(config, identity=identity, run=workdir)
    text, expected = "user 7 likes: a q e", {}
    for name, params in (("trained", saved.learner.state.trainable), ("base", saved.base.trainable())):
        expected[name] = greedy(params, text, 6)
    assert expected["trained"] != expected["base"]
    asked = {"prompt": text, "temperature": 0.0, "max_new_tokens": 6}
    assert ask(workdir, **asked) == (0, [expected["trained"]], [f"step 3 of {workdir}, greedy"])
    assert ask(workdir, **asked, base=True) == ask(None, **asked) == (0, [expected["base"]], ["the untrained policy (random), greedy"])
    assert ask(workdir, **asked, num_completions=2)[1] == [expected["trained"]] * 2


def test_answers_depend_on_the_prompt_alone(workdir):
    """Not on what was asked before; further answers leave the first ones as they are."""
    one, two = "user 1 likes: b b f", "user 2 likes: b b f"
    status, said, _ = ask(workdir, [one, two, one], num_completions=4)
    assert status == 0 and len(said) == 12
    assert said[:4] == said[8:] and said[:4] != said[4:8] and len(set(said[:4])) > 1
    assert ask(workdir, prompt=two, num_completions=4)[1] == said[4:8]
    assert ask(workdir, prompt=two, num_completions=2)[1] == said[4:6]


def test_each_prompt_has_a_random_stream_of_its_own(workdir):
    """So hot that the policy does not matter, an answer shows the stream: it differs between prompts, and is the same for trained and untrained."""
    lines = ["user 1 likes: b b f", "user 2 likes: b b f"]
    hot = {"temperature": 1e9, "num_completions": 2}
    said = ask(workdir, lines, **hot)[1]
    assert len(set(said)) == 4 and said == ask(None, lines, **hot)[1]


def test_a_prompt_that_can_not_be_answered_is_said_and_the_next_one_is_answered(workdir):
    lines = iter(["first", "", "  ", "x" * 250, "a \udcff b", "first"])
    status, said, noted = ask(workdir, lines, max_new_tokens=10)
    assert status == 1 and len(said) == 2 and said[0] == said[1]
    assert noted[1:] == [
        "error: the prompt has 252 tokens, at most 246 leave room for an answer of 10 in the model's context of 256: shorten it, or lower --max_new_tokens",
        "error: the text holds a lone surrogate at character 2, must be Unicode: mend the text's source",
    ]
    assert ask(workdir, ["x" * 244], max_new_tokens=10)[0] == 0  # as long as it may be
    status, said, noted = ask(workdir, ["never read"], prompt="x" * 300)
    assert (status, said) == (1, []) and "has 302 tokens, at most 252" in noted[1]


def test_held_out_prompts_of_a_preference_group_with_answers_and_what_they_earn(workdir):
    config = small_config.config(**CHANGES)
    task = assembly.load_task(config)
    theirs = [p for p in task.prompts("test", 0, 128) if p.preference_id == 1][:3]
    for named in ("1", task.preference_group_names[1]):
        status, said, _ = ask(workdir, held_out=3, preference_group=named, num_completions=2)
        assert status == 0 and len(said) == 12
        for n, prompt in enumerate(theirs):
            head, *answers, blank = said[4 * n : 4 * n + 4]
            assert head == f"{prompt.prompt_id}, preference group 1 (likes bfjnrvz)\n{prompt.text}" and blank == ""
            again = ask(workdir, prompt=prompt.text, num_completions=2)[1]
            assert [answer[8:] for answer in answers] == again
            for answer, text in zip(answers, again):
                characters = set("".join(text.removesuffix(" […]").split()))
                reward = float(answer.split()[0])  # letters: 0.25 + share / 2 for preference group 1
                assert 0.25 <= reward <= 0.75 and (reward > 0.25) == bool(characters & letters.favourite_characters(1, num_preference_groups=3))
    anyone = ask(workdir, held_out=5)[1]
    assert [head.split(",")[0] for head in anyone[::3]] == [p.prompt_id for p in task.prompts("test", 0, 5)]


def named(*names):
    return types.SimpleNamespace(preference_group_names=names)


@pytest.mark.parametrize("wanted, found", [("", None), ("0", 0), ("2", 2), ("+Crime -War", 1)])
def test_a_preference_group_is_found(wanted, found):
    assert policies.find_preference_group(named("no marked taste", "+Crime -War", "no marked taste"), wanted) == found


@pytest.mark.parametrize("wanted, problem", [("3", "is unknown"), ("-1", "is unknown"), ("crime", "is unknown"), ("²", "is unknown"), ("no marked taste", "is the name of several")])
def test_another_preference_group_lists_those_there_are(wanted, problem):
    with pytest.raises(ValueError) as error:
        policies.find_preference_group(named("no marked taste", "+Crime -War", "no marked taste"), wanted)
    listed = "0 (no marked taste), 1 (+Crime -War), 2 (no marked taste)"
    assert str(error.value) == f"--preference_group={wanted} {problem}: give a number, or the name in brackets, of {listed}"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(held_out=129), "--held_out=129 is above the 128 held-out prompts of all preference groups: lower it"),
        (dict(held_out=30, preference_group="2"), "--held_out=30 is above the 21 held-out prompts of preference group 2"),
        (dict(held_out=1, prompt="x"), "--prompt and --held_out=1 are both given: choose one"),
        (dict(prompt="x", temperature=float("nan")), r"--temperature=nan is outside \[0, inf\): 0 is greedy"),
        (dict(prompt="x", temperature=-1.0), "--temperature=-1.0 is outside"),
        (dict(prompt="x", max_new_tokens=256), r"--max_new_tokens=256 is outside \[1, 256\)"),
    ],
)
def test_what_can_not_be_asked(options, message):
    with pytest.raises(ValueError, match=message):
        ask(None, **options)


def test_what_is_asked_for_replaces_what_the_run_has():
    usual = GenerationSettings(max_new_tokens=16, support=Support(0.5, 7, 0.25), stop_ids=(1,), pad_id=0, prompt_buckets=(24, 40))

    def wanted(**options):
        found = sample._wanted(usual, Options(**options), context_length=256)
        return found.max_new_tokens, found.support, found.prompt_buckets

    assert wanted() == (16, Support(0.5, 7, 0.25), (24, 40, 80, 160, 240))
    assert wanted(temperature=2.0, max_new_tokens=100) == (100, Support(2.0, 7, 0.25), (24, 40, 80, 156))
    assert wanted(temperature=0.0, max_new_tokens=230) == (230, Support(top_k=1), (24, 26))


def test_no_checkpoint_and_nothing_is_written(workdir, tmp_path):
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    ask(workdir, prompt="x")
    ask(workdir, held_out=1)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    with pytest.raises(FileNotFoundError, match="no committed checkpoint in .*nowhere/checkpoints"):
        ask(tmp_path / "nowhere", prompt="x")
    assert list(tmp_path.iterdir()) == []


def test_control_characters_do_not_reach_the_terminal():
    assert sample._shown("a\x1b[2J\x07b\n\tc\x9b\u200d👩") == "a [2J b\n\tc \u200d👩"
    assert sample._shown("a", True) == "a […]"
