"""The threads engine beyond the contract: where units run, what is placed when, and how threads end."""

import dataclasses
import functools
import threading
import traceback
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_actor import ScriptedActor, expected_rewards, say, wait_for, weights

from pgrpo_jax.actor import Actor, Sizes
from pgrpo_jax.engines.inline import InlineEngine
from pgrpo_jax.engines.threads import ThreadsEngine
from pgrpo_jax.generation.engine import GenerationSettings
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.tokenizer import ByteTokenizer
from pgrpo_jax.preemption import Stop
from pgrpo_jax.rollout_files import pack_rollouts
from pgrpo_jax.structs import Finished, Started, Work
from pgrpo_jax.tasks import letters
from pgrpo_jax.verifiers.rewards import RewardPool


def place(tree, devices):
    return jax.device_put(tree, devices[0])


def work(index, version=0, step=0):
    return Work(index=index, step=step, version=version)


def engine(actor, sets, **options):
    return ThreadsEngine(actor, actor_devices=sets, stop=Stop(), **{"place": place} | options)


def offer(versions):
    return types.SimpleNamespace(versions=versions)


def collect(made, count):
    """Events until `count` units are finished."""
    events = []
    while sum(isinstance(event, Finished) for event in events) < count:
        events += made.poll(timeout_secs=60.0)[:-1]
    return events


def by_worker(events):
    """Device set -> the units that it generated."""
    sets = {}
    for event in events:
        if isinstance(event, Started):
            sets.setdefault(int(event.worker.split(",")[0].removeprefix("actor ")), []).append(event.work.index)
    return sets


@dataclasses.dataclass(frozen=True)
class Locating:
    """Answers with the devices of what it computes from the weights, and of what it makes itself; waits until both sets are at work."""

    both: threading.Barrier

    def generate(self, tree, unit):
        self.both.wait(timeout=60)
        key = jax.random.fold_in(jax.random.key(3), unit.index)
        return unit, (tree["w"] + jax.random.normal(key, (4,))).devices(), key.devices()

    def judge(self, generated):
        unit, computed, made = generated
        return types.SimpleNamespace(work=unit, computed=computed, made=made)


def test_units_run_on_the_devices_of_their_actor_and_touch_no_other():
    sets = [jax.devices()[5:6], jax.devices()[2:4]]
    made = engine(Locating(threading.Barrier(2)), sets)
    made.publish(offer({0: weights(0)}))
    for index in range(8):
        made.submit(work(index))
    events = collect(made, 8)
    made.close()
    rollouts = {event.rollouts.work.index: event.rollouts for event in events if isinstance(event, Finished)}
    units = by_worker(events)
    assert sorted(units) == [0, 1] and sorted(sum(units.values(), [])) == list(range(8))
    for number, indices in units.items():
        for index in indices:
            assert rollouts[index].computed == rollouts[index].made == {sets[number][0]}


def test_a_sharded_copy_stays_on_its_devices(tmp_path):
    def split(tree, devices):
        return jax.device_put(tree, jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), "x"), jax.sharding.PartitionSpec("x")))

    made = engine(ScriptedActor(str(tmp_path)), [jax.devices()[4:6]], place=split)
    made.publish(offer({2: weights(2)}))
    made.submit(work(1, version=2))
    rollouts = collect(made, 1)[-1].rollouts
    made.close()
    assert rollouts.prompt_records[0].facts == {"devices": sorted(str(device) for device in jax.devices()[4:6])}
    assert rollouts.rewards.tolist() == expected_rewards(work(1, version=2))


def test_each_version_is_placed_once_on_each_device_set(tmp_path):
    placed = []

    def note(tree, devices):
        placed.append((float(tree["w"][0]), tuple(devices)))
        return place(tree, devices)

    sets = [tuple(jax.devices()[1:2]), tuple(jax.devices()[2:4])]
    made = engine(ScriptedActor(str(tmp_path)), sets, place=note)
    first, second = weights(1), weights(2)
    made.publish(offer({2: second, 1: first}))
    assert placed == [(100.0, sets[0]), (100.0, sets[1]), (200.0, sets[0]), (200.0, sets[1])]
    made.publish(offer({2: second}))
    assert len(placed) == 4
    made.publish(offer({2: weights(7)}))  # after a restore: the same number, other weights
    assert placed[4:] == [(700.0, sets[0]), (700.0, sets[1])]
    made.submit(work(0, version=2))
    assert collect(made, 1)[-1].rollouts.rewards.tolist() == [2.0 * (700 + i) for i in range(4)]
    made.close()


@functools.partial(jax.jit, donate_argnums=0)
def overwrite(tree):
    return jax.tree.map(lambda x: x * 0 - 1, tree)


def test_what_the_learner_donates_after_a_publish_does_not_reach_the_actors(tmp_path):
    made = engine(ScriptedActor(str(tmp_path), held=frozenset({"generate 0"})), [jax.devices()[3:4]])
    offered = jax.device_put(weights(4), jax.devices()[0])
    made.publish(offer({4: offered}))
    made.submit(work(0, version=4))
    wait_for(str(tmp_path), "generate 0")
    overwrite(offered)
    assert offered["w"].is_deleted()
    say(str(tmp_path), "open generate 0")
    assert collect(made, 1)[-1].rollouts.rewards.tolist() == expected_rewards(work(0, version=4))
    made.close()


def test_one_unit_is_generated_at_a_time_oldest_step_first(tmp_path):
    held = frozenset({"generate 0"})
    made = engine(ScriptedActor(str(tmp_path), held=held), [jax.devices()[1:2]])
    made.publish(offer({0: weights(0)}))
    made.submit(work(0))
    assert [event.work.index for event in made.poll(timeout_secs=60.0)[:-1]] == [0]
    for index, step in ((50, 5), (11, 1), (10, 1), (60, 6)):
        made.submit(work(index, step=step))
    assert made.poll(timeout_secs=0.2)[:-1] == []  # the second thread waits for the devices
    say(str(tmp_path), "open generate 0")
    begun = [event.work.index for event in collect(made, 5) if isinstance(event, Started)]
    assert begun == [10, 11, 50, 60]
    made.close()


def test_a_device_set_generates_while_it_judges(tmp_path):
    made = engine(ScriptedActor(str(tmp_path), held=frozenset({"judge 0"})), [jax.devices()[1:2]])
    assert made.slots == 2
    made.publish(offer({0: weights(0)}))
    for index in range(3):
        made.submit(work(index))
    for name in ("judge 0", "judge 1 done", "judge 2 done"):  # the first is still being judged
        wait_for(str(tmp_path), name)
    say(str(tmp_path), "open judge 0")
    assert [event.rollouts.work.index for event in collect(made, 3) if isinstance(event, Finished)] == [1, 2, 0]
    made.close()


def test_a_failure_comes_with_its_traceback_and_ends_every_thread(tmp_path):
    made = engine(ScriptedActor(str(tmp_path), failures={"judge 1": "no sandbox"}), [jax.devices()[1:2], jax.devices()[2:3]])
    made.publish(offer({0: weights(0)}))
    made.submit(work(1, step=8))
    with pytest.raises(ValueError, match="no sandbox") as raised:
        made.poll(timeout_secs=60.0)
        made.poll(timeout_secs=60.0)
    assert any(frame.name == "judge" and frame.filename.endswith("contract_actor.py") for frame in traceback.extract_tb(raised.tb))
    assert raised.value.__notes__[0].startswith("raised in actor ") and "Work(index=1, step=8" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match="no sandbox"):  # and again, not an empty list
        made.poll(timeout_secs=60.0)
    made.submit(work(2))
    made.close()
    assert not (tmp_path / "generate 2").exists()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("actor ")]


def test_closing_waits_with_a_deadline_that_names_the_unit(tmp_path):
    made = engine(ScriptedActor(str(tmp_path), held=frozenset({"judge 7"})), [jax.devices()[1:2]], close_secs=0.2)
    made.publish(offer({0: weights(0)}))
    made.submit(work(7, step=3))
    wait_for(str(tmp_path), "judge 7")
    with pytest.raises(TimeoutError, match=r"^still busy 0.2 s after .*: actor 0, lane [01] with work unit 7 of step 3; .*deadline"):
        made.close()
    with pytest.raises(ValueError, match=r"^work unit 8 needs weight version 0, published are \[\]: "):
        made.submit(work(8))
    say(str(tmp_path), "open judge 7")
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("actor ")]:
        thread.join(timeout=60)
    made.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("actor ")]


@pytest.mark.parametrize(
    "sets, message",
    [
        ([], r"sizes \[\], each must be at least 1"),
        ([[0], []], r"sizes \[1, 0\], each must be at least 1"),
        ([[0, 1], [2, 1]], r"devices \S*1 are in more than one actor's set"),
        ([[3, 3]], r"devices \S*3 are in more than one actor's set"),
    ],
)
def test_device_sets_that_can_not_work(sets, message):
    with pytest.raises(ValueError, match=message):
        engine(None, [[jax.devices()[i] for i in numbers] for numbers in sets])


def test_results_do_not_depend_on_the_device_or_the_thread(tmp_path):
    rewards = []
    for sets in ([[0]], [[1], [2], [3]]):
        made = engine(ScriptedActor(str(tmp_path)), [[jax.devices()[i] for i in numbers] for numbers in sets])
        made.publish(offer({0: {"w": jnp.linspace(0, 1, 4, dtype=jnp.float32)}}))
        for index in range(12):
            made.submit(work(index))
        events = collect(made, 12)
        made.close()
        assert set(by_worker(events)) <= set(range(len(sets)))
        rewards.append({e.rollouts.work.index: e.rollouts.rewards.tobytes() for e in events if isinstance(e, Finished)})
    assert rewards[0] == rewards[1]


MODEL = ModelConfig(
    num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=259, context_length=64, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip


def real_actor():
    load = functools.partial(letters.load, "", seed=0, num_preference_groups=3)
    settings = GenerationSettings(
        max_new_tokens=8, support=Support(temperature=0.8), stop_ids=(257, *range(33, 60)), pad_id=120, prompt_buckets=(40,)
    )
    return Actor(
        model=transformer.Transformer(MODEL),
        tokenizer=ByteTokenizer(),
        task=load(),
        rewards=RewardPool(load, num_processes=0, timeout_secs=60.0, on_failure="fail"),
        settings=settings,
        sizes={"train": Sizes(prompts_per_work=2, completions_per_prompt=3)},
        seed=7,
    )


def test_the_real_actor_answers_as_inline_to_the_bit():
    params = transformer.initialise(transformer.Transformer(MODEL), jax.random.key(0))
    units = [work(index) for index in range(3)]
    contents = []
    for made in (InlineEngine(real_actor()), engine(real_actor(), [jax.devices()[5:6]])):
        made.publish(offer({0: params}))
        for unit in units:
            made.submit(unit)
        rollouts = [event.rollouts for event in collect(made, len(units)) if isinstance(event, Finished)]
        made.close()
        rollouts = sorted((dataclasses.replace(r, generation_secs=0.0) for r in rollouts), key=lambda r: r.work.index)
        contents.append(pack_rollouts(rollouts))
    assert contents[0] == contents[1] and len(set(np.concatenate([r.rewards for r in rollouts]).tolist())) > 1
