"""The benchmark's own parts: what is refused, that a ceiling does the matmuls it stands for, how contestants take turns, what is kept."""

import dataclasses
import importlib.util
import json
import sys
import time
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import program
import pytest

from launch import benchmark
from launch.benchmarks import advantages, ceilings, checkpoint, contests, generation, peers, results, step, update
from launch.benchmarks.timing import EndedError, in_turn, ratios
from launch.benchmarks.work import model_config
from launch.peers.job import Job
from pgrpo_jax import batching, parallel
from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.generation.engine import Completions
from pgrpo_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    num_layers=3, width=64, mlp_width=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=512, context_length=64, rope_theta=1e4,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
MATRICES = 3 * (64 * (4 + 4) * 16 + 64 * 64 + 64 * 256 + 128 * 64)
HEAD = 64 * 512
SMALL = Job(num_prompts=2, completions_per_prompt=2, prompt_tokens=4, new_tokens=4, layers=1)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_the_matmuls_of_a_ceiling_are_the_models():
    """Two operations for a weight and a token, the head included, and for each key and value that a query meets; what is not a matmul adds little here."""
    job = Job(num_prompts=4, completions_per_prompt=3, prompt_tokens=16, new_tokens=8)
    prompt, completion = 2 * 16, 2 * 3 * 8  # tokens of two prompts and of their completions
    weights, x = ceilings._weights(CONFIG), jnp.ones((prompt + completion, 64))
    attention = 2 * 4 * 16 * (prompt * 8 + completion * (16 + 4))  # heads, their size, keys met; as much again for values
    qkv = jnp.ones((prompt + completion, 8 * 16))
    assert 1 <= flops(lambda x: ceilings._attend(CONFIG, 2, job, x), qkv) / (2 * attention) < 1.05
    forward = 2 * ((prompt + completion) * MATRICES + completion * HEAD + 3 * attention)
    assert 1 <= flops(lambda w, x: ceilings._forward(CONFIG, 2, job, w, x), weights, x) / forward < 1.06
    backward = flops(lambda w, x: ceilings._gradient(CONFIG, 2, job, w, x), weights, x) / forward
    first = 2 * (prompt + completion) * 64 * (4 + 4) * 16 / forward  # the first layer's input has a gradient that nobody needs
    assert 1 <= backward / (3 - first) < 1.06


def test_ceilings_run():
    ceilings.decode(CONFIG, SMALL)()
    ceilings.learn(CONFIG, SMALL, slices=2)()


@pytest.mark.parametrize(
    "line, reason",
    [
        ("update --against=vllm", "--against=vllm: update knows trl, tunix"),
        ("weights --against=trl", "--against=trl: weights knows no peers"),
        ("generation --ragged --against=tunix", "--against=tunix: generation knows transformers"),
        ("step --ragged", "--ragged: step has no ragged form: leave it out, or measure generation or update"),
        ("generation --ragged --new_tokens=7 --against=transformers", "--new_tokens=7 is below 8"),
        ("step --num_prompts=0", "--num_prompts=0 is below 1: give 1 or more"),
        ("step --rounds=0", "--rounds=0 is below 1"),
        ("weights --new_tokens=8", "weights has a size of its own"),
        ("step --results=no/such/folder/file", "there is no folder no/such/folder: make it"),
    ],
)
def test_what_cannot_be_measured_is_refused(line, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *line.split()])
    with pytest.raises(SystemExit, match="2"):
        benchmark.parsed()
    assert reason in capsys.readouterr().err


def test_the_command_line_names_the_job(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "generation", "--new_tokens=5", "--against=trl,tunix"])
    assert benchmark.parsed()[1:] == (Job(new_tokens=5), ["trl", "tunix"])
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "generation", "--ragged", "--against=transformers"])
    assert benchmark.parsed()[1] == Job(num_prompts=32, new_tokens=128, ragged=True)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "weights"])
    assert benchmark.parsed()[1:] == (None, [])


@pytest.mark.parametrize("prompts, completions, expected", [(8, 8, 2), (32, 8, 2), (9, 8, 1), (2, 2, 2), (12, 1, 4), (8, 64, 1)])
def test_slices_hold_whole_prompts_and_sixteen_sequences_at_most(prompts, completions, expected):
    found = Job(num_prompts=prompts, completions_per_prompt=completions).prompts_per_slice
    assert found == expected and prompts % found == 0 and (found * completions <= 16 or found == 1)


@pytest.mark.parametrize(
    "prompts, completions, prompt_tokens, expected",
    [(8, 8, 64, 2), (4, 8, 64, 1), (4, 8, 256, 2), (8, 8, 256, 4), (2, 16, 256, 2), (9, 8, 64, 3), (8, 64, 64, 8), (32, 1, 4, 1)],
)
def test_our_micro_batches_hold_whole_prompts_and_no_more_tokens_than_fit(prompts, completions, prompt_tokens, expected):
    job = Job(num_prompts=prompts, completions_per_prompt=completions, prompt_tokens=prompt_tokens)
    tokens = prompts * (prompt_tokens + completions * 64) // expected
    found = batching.num_slices(update.batch(job, 0), at_least=1, most_tokens=update.TOKENS, devices=1)
    assert found == expected and prompts % expected == 0 and (tokens <= update.TOKENS or prompts == expected)


def test_ragged_updates_are_packed_or_not(monkeypatch):
    """Both train on the job's own lengths; a full batch is the same to both."""
    seen, scored = [], update.score_slices
    monkeypatch.setattr(update, "score_slices", lambda *arguments: seen.append(arguments[-1]) or scored(*arguments))
    job = Job(num_prompts=2, completions_per_prompt=6, prompt_tokens=4, new_tokens=32, layers=1, ragged=True)
    with jax.numpy_dtype_promotion("standard"):
        for work in (update.ours(job), update.unpacked(job), update.ours(dataclasses.replace(job, ragged=False))):
            assert work(4)["learner_secs"] > 0
    packed, plain, full = seen
    assert packed.packing.shape[-2:] == (2, 64) and plain.packing is None
    for batch in (packed, plain):
        assert np.asarray(batch.completion_mask).sum(axis=-1).reshape(-1).tolist() == job.limits(4).tolist()
    assert full.packing is None and np.all(full.completion_mask)


def test_ragged_lengths_are_uniform_and_the_same_for_whoever_asks():
    job = Job(num_prompts=500, completions_per_prompt=8, new_tokens=128, ragged=True)
    limits = job.limits(3)
    assert limits.shape == (4000,) and limits.dtype == np.int32 and (limits.min(), limits.max()) == (8, 128)
    assert np.bincount(limits, minlength=129)[8:].max() < 70  # 33 of each length expected
    assert abs(limits.mean() - 68) < 4 * np.sqrt((121**2 - 1) / 12 / 4000)
    assert np.array_equal(limits, job.limits(3)) and not np.array_equal(limits, job.limits(4))
    assert np.all(SMALL.limits(0) == 4) and set(Job(new_tokens=8, ragged=True).limits(0)) == {8}


def test_who_ends_is_left_out_and_the_others_go_on():
    def fragile(seed):
        if seed == 2:
            raise EndedError("too much")
        return 10 * seed

    found, ended = in_turn(3, {"fragile": fragile, "other": lambda seed: seed})
    assert (found, ended) == ({"fragile": [10], "other": [1, 2, 3]}, {"fragile": "too much"})
    assert ratios(found["other"], found["fragile"]) == [0.1]


DRIVER = """
import json, os, pathlib, signal, sys, tempfile, time
import protocol
benchmark, job = protocol.asked()
time.sleep(0.2)
for seed in protocol.rounds():
    print('noise of a library')
    if seed == 9: sys.exit('out of memory')
    if seed == 7: raise MemoryError
    if seed == 6: os.kill(os.getpid(), signal.SIGKILL)
    if seed == 8: time.sleep(600)
    if seed == int(os.environ.get('ENDS_IN', '-1')): sys.exit('enough')
    cache = pathlib.Path(os.environ.get('JAX_COMPILATION_CACHE_DIR', 'none'))
    warm = cache.exists()
    if cache.name != 'none': cache.mkdir(exist_ok=True)
    left = tempfile.mkdtemp()
    protocol.answer(
        generation_tokens_per_sec=2.0 * seed, step_secs=4.0, warm=warm, left=left, shape=protocol.shape(job), benchmark=benchmark,
        prompt=int(job.prompts(seed)[0, 0]), limits=job.limits(seed).tolist(),
    )
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Drivers that answer with the seed twice over and end at seeds 6, 7 and 9, in this environment; returns the folder of the log."""
    (tmp_path / "small_driver.py").write_text(DRIVER)
    (tmp_path / "own_driver.py").write_text("import sys\nassert sys.argv.pop(1) == 'ours'\n" + DRIVER)
    for name in ("protocol.py", "job.py"):
        (tmp_path / name).write_text((program.ROOT / "launch" / "peers" / name).read_text())
    monkeypatch.setattr(peers, "_DRIVERS", tmp_path)
    monkeypatch.setattr(peers, "installed", lambda name: (sys.executable, tmp_path))
    return tmp_path


ARGUMENTS = ["generation", *SMALL.options()]


@pytest.mark.parametrize(
    "seed, reason",
    [
        (9, r"small ended with status 1 in round 9: read \S+log.txt \(out of memory\)"),
        (7, r"small ended with status 1 in round 7: read \S+log.txt \(MemoryError\)"),
        (6, r"small ended by SIGKILL, as Linux does where memory runs out, in round 6: read"),
    ],
)
def test_contestants_take_turns_and_say_why_they_ended(driver, seed, reason):
    with peers.started(["small"], ARGUMENTS) as others:
        peer = others["small"]
        assert [peer.round(n)["generation_tokens_per_sec"] for n in (3, 5)] == [6.0, 10.0] and peer.peak_gib > 0.001
        with pytest.raises(EndedError, match=reason):
            peer.round(seed)
        with pytest.raises(EndedError, match="small ended"):  # and once more
            peer.round(1)
    assert "noise of a library" in (driver / "log.txt").read_text()


def test_a_contestant_that_does_not_answer_is_given_up(driver, monkeypatch):
    with peers.started(["small"], ARGUMENTS) as others:
        others["small"].round(1)
        monkeypatch.setattr(peers, "ROUND_SECS", 0.3)
        with pytest.raises(EndedError, match="small has not finished round 8 within 0.3 s: read"):
            others["small"].round(8)


def test_a_driver_starts_at_its_first_round_and_ends_with_the_benchmark(driver):
    with peers.started(["small"], ARGUMENTS) as others:
        peer = others["small"]
        assert peer._process is None and peer.cold_start_secs is None
        left = peer.round(1)["left"]
        cold, process = peer.cold_start_secs, peer._process
        assert 0.2 < cold < 30  # it sleeps for 0.2 s before its first round
        peer.round(2)
        assert peer.cold_start_secs == cold and process.poll() is None
    assert process.poll() is not None
    assert not driver.joinpath(left).exists()


def test_memory_is_the_contestants_own(driver):
    """Linux hands a process's peak, in ru_maxrss, on to the programs that it starts."""
    ballast = np.ones(2**26)  # 0.5 GiB
    with peers.started(["small"], ARGUMENTS) as others:
        others["small"].round(1)
    assert ballast.nbytes == 2**29 and 0.005 < others["small"].peak_gib < 0.4


def test_drivers_know_the_job_and_the_model(driver):
    job = Job(num_prompts=3, completions_per_prompt=2, prompt_tokens=5, new_tokens=9, layers=4, ragged=True)
    with peers.started(["small"], ["generation", *job.options()]) as others:
        found = others["small"].round(3)
    assert found["benchmark"] == "generation" and found["prompt"] == job.prompts(3)[0, 0] and found["limits"] == job.limits(3).tolist()
    config, theirs = model_config(job), found["shape"]
    ours = {
        "num_hidden_layers": config.num_layers, "hidden_size": config.width, "intermediate_size": config.mlp_width, "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings, "rms_norm_eps": config.norm_epsilon, "rope_theta": config.rope_theta,
        "max_position_embeddings": config.context_length,
    }  # fmt: skip
    assert theirs == ours and config.num_layers == 4 and Job().layers == 30


def test_ragged_completions_are_refilled_or_generated_batch_by_batch(monkeypatch):
    """Every way gives each completion the tokens that were asked for; batches hold whole prompts; what is stored otherwise is asked for."""
    job = Job(num_prompts=3, completions_per_prompt=4, prompt_tokens=4, new_tokens=12, layers=1, ragged=True)
    monkeypatch.setattr(generation, "SLOTS", 8)
    done, stored, sampled = [], [], generation.sampled

    def watched(*arguments, **changes):
        out, what = sampled(*arguments, **changes), generation.engine_settings(job, **changes)
        done.append((out.lengths.tolist(), what.slots, what.smallest_batch))
        stored.append((what.weights, what.cache))
        return out

    monkeypatch.setattr(generation, "sampled", watched)
    limits = job.limits(5).tolist()
    assert generation.ours(job)(5)["generation_tokens_per_sec"] > 0 and done == [(limits, 8, 16)]
    done.clear()
    for without_refill, smallest in ((generation.batches, 8), (generation.halved_batches, 16)):
        assert without_refill(job)(5)["generation_tokens_per_sec"] > 0 and done == [(limits[:8], 8, smallest), (limits[8:], 8, smallest)]
        done.clear()
    assert set(stored) == {("model", "model")}
    for storage in ("bfloat16", "int8"):
        assert getattr(generation, storage)(job)(5)["generation_tokens_per_sec"] > 0 and stored[-1] == (storage, storage)
    monkeypatch.setattr(generation, "sampled", sampled)
    monkeypatch.setattr(generation.engine, "generate", lambda *_, **named: types.SimpleNamespace(lengths=named["limits"].reshape(-1) - 1))
    with pytest.raises(ValueError, match=f"generated {sum(limits) - 12} tokens: not the {sum(limits)} that were asked for"):
        generation.ours(job)(5)


@pytest.fixture
def transformers_driver(monkeypatch):
    """The driver's own functions; torch and transformers, which are not of this environment, are stood in for."""
    stand_ins = types.SimpleNamespace(LlamaConfig=None, LlamaForCausalLM=None, StoppingCriteria=object, StoppingCriteriaList=list)
    torch = types.SimpleNamespace(Tensor=np.ndarray, ones_like=np.ones_like)
    for name, module in (("torch", torch), ("transformers", stand_ins), ("protocol", types.SimpleNamespace())):
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("transformers_driver", program.ROOT / "launch" / "peers" / "transformers_driver.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_sequence_of_transformers_stops_at_its_own_length(transformers_driver):
    flags = []

    class Model:
        def generate(self, *, input_ids, max_new_tokens, stopping_criteria, **_):
            (criterion,) = stopping_criteria
            for _ in range(max_new_tokens):
                input_ids = np.concatenate([input_ids, input_ids[:, :1]], axis=1)
                flags.append(criterion(input_ids, None).tolist())
                if all(flags[-1]):
                    break
            return input_ids

    transformers_driver.generate(Model(), np.zeros((3, 5), np.int64), np.array([2, 1, 3]))
    assert flags == [[False, True, False], [True, True, False], [True, True, True]]
    Model.generate = lambda self, *, input_ids, **_: input_ids
    with pytest.raises(ValueError, match=r"generated \(3, 5\): not the tokens"):
        transformers_driver.generate(Model(), np.zeros((3, 5), np.int64), np.array([2, 1, 3]))


def test_speed_is_a_multiple_of_the_others():
    of_rates = contests.Contest("generation", {"rate": "tokens/s"}, True, ("pgrpo_jax",), ())
    rates = {"pgrpo_jax": [{"rate": 6.0}, {"rate": 8.0}], "peer": [{"rate": 2.0}], "lost": []}
    assert contests.measured(of_rates, rates) == {
        "pgrpo_jax, tokens/s": [6.0, 8.0], "peer, tokens/s": [2.0], "pgrpo_jax / peer, speed": [3.0]
    }  # fmt: skip
    of_secs = contests.Contest("step", {"secs": "s", "rate": "tokens/s"}, False, ("pgrpo_jax",), ())
    secs = {"pgrpo_jax": [{"secs": 2.0, "rate": 1.0}], "peer": [{"secs": 6.0, "rate": 7.0}]}
    found = contests.measured(of_secs, secs)
    assert found["pgrpo_jax / peer, speed"] == [3.0] and found["peer, tokens/s"] == [7.0] and len(found) == 5
    assert contests.measured(of_secs, {"pgrpo_jax": [], "peer": secs["peer"]}) == {"peer, s": [6.0], "peer, tokens/s": [7.0]}


def test_a_contest_goes_on_without_who_ended(driver, monkeypatch):
    monkeypatch.setenv("ENDS_IN", "2")
    contest = contests.Contest("step", {"step_secs": "s"}, False, (), ("small",))
    found = contests.hold(contest, SMALL, rounds=3, against=["small"])
    assert found.quantities["small, s"] == [4.0] and found.quantities["small, peak memory, GiB"][0] > 0
    assert list(found.ended) == ["small"] and "in round 2" in found.ended["small"] and "(enough)" in found.ended["small"]
    monkeypatch.setenv("ENDS_IN", "0")
    found = contests.hold(contest, SMALL, rounds=1, against=["small"])
    assert found.quantities == {} and list(found.ended) == ["small"]


def test_cold_starts_are_with_an_empty_and_with_a_warm_cache(driver, monkeypatch):
    contest, seen = contests.Contest("step", {"step_secs": "s"}, False, ("pgrpo_jax",), ("small",), cold_starts=True), []
    inner = peers.Contestant.round
    monkeypatch.setattr(peers.Contestant, "round", lambda self, seed: seen.append((self._name, inner(self, seed))) or seen[-1][1])
    found = contests.hold(contest, SMALL, rounds=1, against=["small"])
    assert [(name, answer["warm"]) for name, answer in seen[:3]] == [("pgrpo_jax", False), ("pgrpo_jax", True), ("small", False)]
    less = {name: values for name, values in found.quantities.items() if "less a usual step" in name}
    kinds = [name for name in found.quantities if "cold start" in name and name not in less]
    caches = [f"pgrpo_jax, cold start with {cache} compilation cache, s" for cache in ("an empty", "a warm")]
    assert kinds == [*caches, "small, cold start, s"] and all(found.quantities[name][0] > 0.2 for name in kinds)
    for name in kinds:
        step = found.quantities[name.split(",")[0] + ", s"][0]  # of the one round
        assert less[name.replace(", s", " less a usual step, s")] == [found.quantities[name][0] - step]
    assert len(less) == 3
    without = contests.hold(dataclasses.replace(contest, cold_starts=False), SMALL, rounds=1, against=[])
    assert [name for name in without.quantities if "cold start" in name] == ["pgrpo_jax, cold start, s"]
    monkeypatch.setenv("ENDS_IN", "0")
    assert list(contests.hold(contest, SMALL, rounds=1, against=[]).ended) == ["pgrpo_jax"]


def test_results_hold_every_round_and_where_they_come_from():
    found = contests.Found({"a, s": [3.0, 1.0, 2.0, 9.0], "nothing": []}, {"trl": "trl ended"})
    row = json.loads(json.dumps(results.row("step", found, job=SMALL, against=["trl"])))
    assert row["results"] == {"a, s": {"median": 2.5, "min": 1.0, "max": 9.0, "rounds": [3.0, 1.0, 2.0, 9.0]}}
    assert row["ended"] == {"trl": "trl ended"} and row["job"]["num_prompts"] == 2 and "trl==1.16.0" in row["peers"]["trl"]
    assert row["machine"]["jax"] == jax.__version__ and row["machine"]["cores"] >= 1 and row["date"].endswith("+00:00")
    assert 1 < row["machine"]["matmul_gflops"] < 10**6 and row["machine"]["memory_gib"] > 0.5 and row["machine"]["cpu"]


def test_the_commit_is_that_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_ROOT", tmp_path)
    assert results.commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("a")
    for line in (["init", "-q"], ["add", "file"], ["commit", "-qm", "a"]):
        assert program.run([*git, *line], cwd=tmp_path).returncode == 0
    head = program.run(["git", "rev-parse", "HEAD"], cwd=tmp_path).stdout.strip()
    assert results.commit() == head and len(head) == 40
    (tmp_path / "file").write_text("b")
    assert results.commit() == head + "+"


@pytest.mark.parametrize("name, unit", [("generation", "tokens/s"), ("update", "s"), ("step", "s")])
def test_a_benchmark_from_end_to_end(name, unit, tmp_path, cache):
    """On one layer; the first run of the others compiles for the later ones, a step keeps a cache of its own."""
    line = [sys.executable, "launch/benchmark.py", name, "--rounds=1", *SMALL.options(), f"--results={tmp_path / 'results'}"]
    done = program.run(line, cache=cache)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    (row,) = [json.loads(text) for text in (tmp_path / "results").read_text().splitlines()]
    ours, ceiling = (row["results"][f"{who}, {unit}"]["median"] for who in ("pgrpo_jax", "ceiling"))
    speed = ours / ceiling if unit == "tokens/s" else ceiling / ours
    assert row["results"]["pgrpo_jax / ceiling, speed"]["median"] == pytest.approx(speed) and row["ended"] == {} and row["benchmark"] == name
    assert 0.1 < row["results"]["pgrpo_jax, peak memory, GiB"]["median"] < 8
    if name == "step":
        assert row["results"]["pgrpo_jax, tokens/s"]["median"] == pytest.approx(16 / ours)
        empty, warm = (row["results"][f"pgrpo_jax, cold start with {kind} compilation cache, s"]["median"] for kind in ("an empty", "a warm"))
        assert warm < empty


def test_the_reward_of_a_step_is_the_share_of_even_tokens():
    tokens = np.array([[2, 4, 5, 8], [3, 0, 0, 0], [2, 0, 0, 0], [1, 1, 6, 0]], np.int32)
    done = Completions(tokens=tokens, lengths=np.array([4, 1, 1, 3], np.int32), log_probs=np.zeros((4, 4), np.float32), truncated=np.ones(4, bool))
    found = step.rollouts(SMALL, done, step=5, seed=1)
    assert np.allclose(found.rewards, [3 / 4, 0, 1, 1 / 3]) and found.rewards.dtype == np.float32
    assert (found.work.step, found.work.version) == (5, 5) and np.array_equal(found.prompts, SMALL.prompts(1))


def test_the_loop_in_numpy_gives_the_kernels_advantages():
    """With cold and with warm histories."""
    kernel = parallel.advantage_kernel(advantages.SETTINGS, jax.devices()[:1], num_prompts=8)
    history, looped = (jax.device_get(reward_history.init(3, np.float32)) for _ in range(2))
    for seed in range(4):
        rewards, index, *rest = batch = advantages.batch(seed, 64, 3)
        warm = np.asarray(history.count) >= advantages.SETTINGS.min_count
        expected, history, _ = kernel(*batch, history)
        found, looped = advantages.in_numpy(rewards, index, rest[1], looped)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(looped.mean, history.mean, rtol=1e-5)
        np.testing.assert_allclose(looped.m2, history.m2, rtol=1e-4)
    assert warm.any()


def test_the_advantage_kernel_is_timed():
    found = advantages.measure(2, rewards=64, preference_groups=3)
    assert [len(values) for values in found.values()] == [2] * 5 and all(value > 0 for values in found.values() for value in values)
    assert found["kernel / copy, speed"][1] == pytest.approx(found["copy, µs"][1] / found["kernel, µs"][1])


def test_a_plain_write_is_the_bytes_and_no_array_compresses(tmp_path):
    """Zeros, as of the moments before the first update, would be written in no time by what compresses."""
    state = checkpoint.make_state(CONFIG)
    for leaf in jax.tree.leaves((state.trainable, state.optimiser)):
        assert leaf.ndim == 0 or len(zlib.compress(np.asarray(leaf).tobytes())) > 0.85 * leaf.nbytes
    checkpoint.plain_write(state, tmp_path / "plain")
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    assert (tmp_path / "plain").read_bytes() == b"".join(leaf.tobytes() for leaf in leaves)


def test_extra_memory_is_what_was_held_meanwhile():
    del_me = np.ones(2**26)  # 0.5 GiB that are gone before
    del del_me
    memory = checkpoint.Memory()
    ballast = np.ones(2**24)
    size = ballast.nbytes
    del ballast
    assert 0.9 * size < memory.extra_bytes() < 2 * size


def test_checkpoints_are_timed():
    found = checkpoint.measure(2, CONFIG)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.make_state(CONFIG)))
    assert found.pop("state, GB") == [size / 1e9] and all(len(values) == 2 for values in found.values())
    for held, plain, ratio in zip(*(found[name] for name in ("save holds up, s", "plain write, s", "save holds up / plain write"))):
        assert held > 0 and ratio == pytest.approx(held / plain)
    assert all(value >= 0 for name in found for value in found[name])


def test_a_save_is_timed_to_its_return_and_to_its_commit(tmp_path):
    class Slow:
        def save(self, state, versions, *, wait=False):
            time.sleep(0.3 if wait else 0.1)

        def restore(self, like):
            time.sleep(0.2)
            return np.ones(2**23)  # 64 MiB: the allocator takes less from what other tests have freed

    state = checkpoint.make_state(CONFIG)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    found = checkpoint.one_round(state, Slow(), tmp_path / "plain", size)
    assert 0.1 <= found["save holds up, s"] < 0.3 and 0.2 <= found["restore, s"] < 1.2 and 0.4 <= found["until committed, s"] < 1.4
    assert found["until committed / plain write"] == pytest.approx(found["until committed, s"] / found["plain write, s"])
    assert 0.9 * 2**26 < found["restore, extra memory / state"] * size < 2 * 2**26 and not (tmp_path / "plain").exists()
