"""Generation: against SmolLM2's reference answers, the uncached forward and exact probabilities; how often what is computed."""

import dataclasses
import functools
import itertools
import math
import pathlib

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pgrpo_jax import buckets
from pgrpo_jax.generation import decoding, engine, kv_cache, sampler
from pgrpo_jax.generation.engine import GenerationSettings
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer, weights
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import parameter_shapes

MODEL = pathlib.Path(".assets/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf")
REFERENCE = pathlib.Path(__file__).parents[1] / "data" / "smollm2_reference.npz"
CONFIG = ModelConfig(
    num_layers=2, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=23, context_length=64, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
TINY = transformer.Transformer(CONFIG)
PROMPTS = [[3], [1, 2, 3, 4, 5], [7, 8, 22]]  # 1 token, a whole bucket, and in between


def draw_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: rng.normal(0, 0.4, spec.shape).astype(np.float32), parameter_shapes(config))


PARAMS = draw_params(CONFIG)


def settings(**changes):
    values = dict(max_new_tokens=6, support=Support(), stop_ids=(0, 11), pad_id=2, prompt_buckets=(5, 12))
    return GenerationSettings(**{**values, **changes})


def generate(prompts, what, *, seed=0, completions_per_prompt=4, model=TINY, params=PARAMS):
    padded, lengths = engine.pad_prompts(prompts, buckets=what.prompt_buckets, pad_id=what.pad_id)
    key = jax.random.key(seed)
    return engine.generate(model, params, padded, lengths, key, completions_per_prompt=completions_per_prompt, settings=what)


@functools.partial(jax.jit, static_argnums=0)
def log_softmax(model, params, tokens):
    """[B, T] -> [B, T, V], one forward pass without cache or context."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    hidden, _ = transformer.forward(model, params, tokens, positions)
    return jax.nn.log_softmax(transformer.logits(params, hidden), axis=-1)


def uncached(model, params, prompts, out):
    """Log-probs [N, Tc] of completions by one forward pass over prompt + completion, rows padded on the right; 0 on padding."""
    per_prompt, (count, size) = len(out.tokens) // len(prompts), out.tokens.shape
    width = max(map(len, prompts)) + size
    rows = np.zeros((count, width), np.int32)
    for n, tokens in enumerate(out.tokens):
        prompt = prompts[n // per_prompt]
        rows[n, : len(prompt) + size] = [*prompt, *tokens]
    scores, expected = np.asarray(log_softmax(model, params, rows)), np.zeros((count, size))
    for n, t in itertools.product(range(count), range(size)):
        if t < out.lengths[n]:
            expected[n, t] = scores[n, len(prompts[n // per_prompt]) + t - 1, out.tokens[n, t]]
    return expected


@pytest.fixture(scope="module")
def smollm2():
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: run launch/test.sh, which fetches it")
    config, params = weights.load(MODEL)
    reference = np.load(REFERENCE)
    return transformer.Transformer(config), params, [reference[f"ids{k}"].tolist() for k in range(3)], reference


def test_smollm2_greedy_answers_equal_the_reference(smollm2):
    """All three prompts (5, 11 and 44 tokens) in one batch, through the cache, token for token and stop for stop."""
    model, params, prompts, reference = smollm2
    what = settings(max_new_tokens=48, support=Support(top_k=1), stop_ids=(2,), prompt_buckets=(44,))
    out = generate(prompts, what, completions_per_prompt=1, model=model, params=params)
    answers = [reference[f"greedy{k}"] for k in range(3)]
    assert out.lengths.tolist() == [len(answer) for answer in answers] == [30, 48, 17]
    assert out.truncated.tolist() == [False, True, False]
    for tokens, answer in zip(out.tokens, answers):
        np.testing.assert_array_equal(tokens[: len(answer)], answer)


def test_smollm2_cached_log_probs_equal_the_uncached_forward(smollm2):
    model, params, prompts, _ = smollm2
    what = settings(max_new_tokens=8, stop_ids=(2,), prompt_buckets=(44,))
    out = generate(prompts, what, completions_per_prompt=2, model=model, params=params)
    np.testing.assert_allclose(out.log_probs, uncached(model, params, prompts, out), atol=1e-4)


@pytest.mark.parametrize(
    "prompts, completions_per_prompt",
    [(PROMPTS, 4), (PROMPTS, 1), ([[5]], 4), ([[1] * 12, [2] * 6], 3)],
    ids=["uneven", "uneven, one completion each", "one token", "longer bucket"],
)
def test_cached_log_probs_equal_the_uncached_forward(prompts, completions_per_prompt):
    out = generate(prompts, settings(stop_ids=(0,)), completions_per_prompt=completions_per_prompt)
    expected = uncached(TINY, PARAMS, prompts, out)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(out.log_probs, expected, atol=1e-5)


def test_two_tokens_follow_their_exact_joint_probability():
    """20,000 completions of one prompt: tokens of a completion, and completions of a prompt, are drawn independently."""
    prompt, vocab, count = [4, 9], CONFIG.vocab_size, 20_000
    out = generate([prompt], settings(max_new_tokens=2, stop_ids=()), completions_per_prompt=count)
    pairs = np.array([[*prompt, token] for token in range(vocab)], np.int32)
    scores = np.asarray(log_softmax(TINY, PARAMS, pairs), np.float64)
    joint = np.exp(scores[0, 1][:, None] + scores[:, 2]).ravel()
    counts = np.bincount(out.tokens[:, 0] * vocab + out.tokens[:, 1], minlength=vocab**2)
    likely = count * joint > 5
    expected = np.append(joint[likely], joint[~likely].sum()) * count
    observed = np.append(counts[likely], counts[~likely].sum())
    chi_square = np.sum((observed - expected) ** 2 / expected)
    assert len(expected) > 50 and 1e-3 < scipy.stats.chi2.sf(chi_square, len(expected) - 1) < 1 - 1e-3


def test_what_lies_behind_a_stop_token():
    """Drawn tokens do not depend on the stop list up to the first stop, so a run without one shows where the others must end."""
    free = generate(PROMPTS, settings(stop_ids=()), completions_per_prompt=16)
    assert free.truncated.all() and np.all(free.lengths == 6) and np.all(free.log_probs < 0)
    seen = set()
    for stops in ((11,), (4, 5, 6, 7, 8, 9, 10, 11, 12, 13)):
        out = generate(PROMPTS, settings(stop_ids=stops), completions_per_prompt=16)
        for n in range(48):
            ends = [t for t in range(6) if free.tokens[n, t] in stops]
            length = ends[0] + 1 if ends else 6
            assert (out.lengths[n], out.truncated[n]) == (length, not ends)
            np.testing.assert_array_equal(out.tokens[n], [*free.tokens[n, :length], *[2] * (6 - length)])
            np.testing.assert_array_equal(out.log_probs[n, :length], free.log_probs[n, :length])
            np.testing.assert_array_equal(out.log_probs[n, length:], 0)
            seen.add((length, not ends))
    assert {(1, False), (6, True), (6, False)} <= seen  # stopped at once, never, and by the very last token
    assert (out.tokens.dtype, out.lengths.dtype, out.log_probs.dtype, out.truncated.dtype) == (np.int32, np.int32, np.float32, bool)


def test_a_pad_token_that_is_also_the_stop_token_is_counted_once():
    out = generate(PROMPTS, settings(stop_ids=(2,), pad_id=2), completions_per_prompt=16)
    for tokens, length, truncated in zip(out.tokens, out.lengths, out.truncated):
        assert 2 not in tokens[: length - 1] and (tokens[length - 1] == 2) != truncated and np.all(tokens[length:] == 2)


def test_same_key_same_bits_other_key_other_tokens():
    first, again, other = (generate(PROMPTS, settings(), seed=seed) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(vars(first), vars(again))
    assert (first.tokens != other.tokens).mean() > 0.5
    assert len({row.tobytes() for row in first.tokens[4:8]}) > 1  # completions of one prompt differ


@pytest.mark.parametrize("support", [Support(), Support(temperature=1.2, top_k=5, top_p=0.8)])
def test_a_completion_does_not_depend_on_its_neighbours(support):
    """Same shape, other prompts in the other rows (so that they stop elsewhere): the same bits."""
    first = generate(PROMPTS, settings(support=support))
    other = generate([[9, 9, 9, 9], PROMPTS[1], [20]], settings(support=support))
    for name in ("tokens", "lengths", "log_probs", "truncated"):
        np.testing.assert_array_equal(getattr(first, name)[4:8], getattr(other, name)[4:8])
    assert np.any(first.tokens[:4] != other.tokens[:4]) and np.any(first.tokens[8:] != other.tokens[8:])


def test_filling_behind_a_prompt_changes_nothing():
    padded, lengths = engine.pad_prompts(PROMPTS, buckets=(5,), pad_id=2)
    rubbish = np.where(np.arange(5)[None, :] < lengths[:, None], padded, 17).astype(np.int32)
    assert np.any(rubbish != padded)
    run = functools.partial(engine.generate, TINY, PARAMS, completions_per_prompt=4, settings=settings())
    ours, other = (run(prompts=rows, lengths=lengths, key=jax.random.key(0)) for rows in (padded, rubbish))
    chex.assert_trees_all_equal(vars(ours), vars(other))


def run_of(prompts, what, *, completions_per_prompt, seed=0, limits=None):
    """What the engine holds at the beginning of a call, and the arguments of its first `decode`."""
    padded, lengths = engine.pad_prompts(prompts, buckets=what.prompt_buckets, pad_id=what.pad_id)
    shape = (len(prompts), completions_per_prompt)
    limits = np.full(shape, what.max_new_tokens, np.int32) if limits is None else limits
    run = engine._Run(TINY, PARAMS, padded, lengths, jax.random.key(seed), limits, np.zeros(len(padded), np.int32), what)
    nothing = decoding.Until(step=np.int32(99), running=np.int32(0), per_block=np.int32(0), blocks=np.int32(0))
    arguments = (run._weights, run._beginning, run._prefix, run._caches, run._slots.state, run._drawn, run._key, np.int32(0), np.int32(0), nothing)
    return run, (TINY, what, run._arrangement["places"], *arguments)


def multiplications(jaxpr):
    """Multiplications of the matrix products of a program, {"before": ..., "loop": those of one turn of a while loop}."""
    total = {"before": 0, "loop": 0}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = math.prod(equation.outvars[0].aval.shape) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total["before"] += size
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            inside = multiplications(inner)
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            place = "loop" if equation.primitive.name == "while" else "before"
            total[place] += times * inside["before"]
            total["loop"] += times * inside["loop"]
    return total


def test_each_prompt_is_computed_once_and_decoding_is_one_loop_on_the_device():
    """The last layer's keys and values need no attention and no MLP: its prompts cost their projections only."""
    c, (p, length, size) = CONFIG, (3, 5, 6)
    project, rest = c.width * c.head_dim * (c.num_heads + 2 * c.num_kv_heads), c.width * (c.num_heads * c.head_dim + 3 * c.mlp_width)
    for g in (1, 5):
        run, arguments = run_of(PROMPTS, settings(), completions_per_prompt=g)
        prefill = decoding.prefill.trace(TINY, "model", run._weights, np.zeros((p, length), np.int32), np.zeros(p, np.int32)).jaxpr
        prefill, _ = jax.interpreters.partial_eval.dce_jaxpr(prefill.jaxpr, [True] * len(prefill.jaxpr.outvars))
        attention = 2 * c.num_heads * c.head_dim
        once = (c.num_layers - 1) * p * length * (rest + attention * length) + c.num_layers * p * length * project
        assert multiplications(prefill) == {"before": once, "loop": 0}
        jaxpr = decoding.decode.trace(*arguments).jaxpr
        assert [equation.primitive.name for equation in jaxpr.eqns].count("while") == 1
        step = c.num_layers * p * g * (project + rest + attention * (length + size)) + p * g * c.width * c.vocab_size
        assert multiplications(jaxpr.jaxpr) == {"before": 0, "loop": step}


def test_compiles_once_for_each_bucket():
    what = settings(max_new_tokens=3, prompt_buckets=(4, 9), support=Support(temperature=0.9))
    sizes = {name: getattr(decoding, name)._cache_size() for name in ("prefill", "decode")}
    for lengths in ((1, 2), (4, 3), (2, 2), (5, 1), (9, 9), (1, 7), (3, 4)):
        # equal models and settings made anew, other weights and another key: still the same program
        model = transformer.Transformer(ModelConfig(**vars(CONFIG)))
        anew = GenerationSettings(**vars(what))
        generate([[1] * n for n in lengths], anew, seed=lengths[0], model=model, params=draw_params(CONFIG, seed=lengths[1]))
    assert {name: getattr(decoding, name)._cache_size() - size for name, size in sizes.items()} == {"prefill": 2, "decode": 2}


def test_stops_decoding_when_every_completion_has_ended():
    for stops, turns in (((), 6), (tuple(range(12)), None)):
        _, arguments = run_of(PROMPTS, settings(stop_ids=stops), completions_per_prompt=4, seed=3)
        _, slots, _, step = decoding.decode(*arguments)
        assert int(step) == (np.max(slots.ages) if turns is None else turns) and not np.any(slots.running)
    assert 1 < int(step) < 6


def alone(prompt, limit, n, *, seed, what):
    """Completion n decoded by itself: tokens by the uncached forward, one at a time, with the same random numbers."""
    stream, tokens, scores = jax.random.fold_in(jax.random.key(seed), n), [], []
    for i in range(limit):
        row = np.array([[*prompt, *tokens] + [0] * (65 - len(prompt) - i)], np.int32)
        logits = np.asarray(log_softmax(TINY, PARAMS, row))[:, len(prompt) + i - 1]
        uniform = jax.random.uniform(jax.random.fold_in(stream, i), (1,), jnp.float32)
        token, score = jax.jit(sampler.sample, static_argnums=2)(logits, uniform, what.support)
        tokens.append(int(token[0]))
        scores.append(float(score[0]))
        if tokens[-1] in what.stop_ids:
            break
    return tokens, scores


@pytest.mark.parametrize("slots, completions_per_prompt, bucket", [(4, 4, 12), (8, 4, 41), (2, 4, 41), (12, 3, 41), (3, 1, 12), (1, 2, 12), (0, 4, 12)])
def test_refilled_slots_draw_what_each_completion_draws_alone(slots, completions_per_prompt, bucket):
    """Six prompts of uneven lengths, limits from 1 to 40 tokens, stop tokens: the ring goes round several times. Prompts in a bucket above 40 are
    shared in blocks."""
    rng = np.random.default_rng(slots)
    prompts = [rng.integers(3, 23, length).tolist() for length in (1, 5, 3, 2, 5, 4)]
    what = settings(max_new_tokens=40, stop_ids=(0,), slots=slots, prompt_buckets=(bucket,))
    limits = rng.integers(1, 41, (6, completions_per_prompt)).astype(np.int32)
    padded, lengths = engine.pad_prompts(prompts, buckets=what.prompt_buckets, pad_id=what.pad_id)
    out = engine.generate(
        TINY, PARAMS, padded, lengths, jax.random.key(7), completions_per_prompt=completions_per_prompt, settings=what, limits=limits.reshape(-1)
    )
    for n in range(limits.size):
        tokens, scores = alone(prompts[n // completions_per_prompt], limits.reshape(-1)[n], n, seed=7, what=what)
        assert out.tokens[n].tolist() == tokens + [2] * (40 - len(tokens)) and out.lengths[n] == len(tokens)
        np.testing.assert_allclose(out.log_probs[n, : len(tokens)], scores, atol=1e-5)
        assert out.truncated[n] == (tokens[-1] != 0)
    assert out.truncated.any() and not out.truncated.all()


BEGINNING = np.random.default_rng(5).integers(3, 23, 40).tolist()  # of which 32 columns are shared


@pytest.mark.parametrize("slots, bucket", [(0, 48), (2, 48), (4, 80)])
def test_what_all_prompts_begin_with_is_computed_once_and_changes_nothing(slots, bucket):
    """Slots for all, slots of their own, blocks of slots; the shortest prompt ends where the beginning does."""
    prompts = [BEGINNING + rest for rest in ([], [1, 2, 3, 4, 5], [7, 8, 22], [9])]
    what = settings(max_new_tokens=20, stop_ids=(0,), slots=slots, prompt_buckets=(bucket,))
    run, arguments = run_of(prompts, what, completions_per_prompt=3)
    assert kv_cache.extent(run._beginning) == (1, 32) and kv_cache.extent(run._prefilled) == (4, bucket - 32)
    assert len(run._slots.table) == {0: 4, 2: 2, 4: 1}[slots]
    out = generate(prompts, what, seed=3, completions_per_prompt=3)
    for n in range(12):
        tokens, scores = alone(prompts[n // 3], 20, n, seed=3, what=what)
        assert out.tokens[n, : out.lengths[n]].tolist() == tokens
        np.testing.assert_allclose(out.log_probs[n, : len(tokens)], scores, atol=1e-5)
    rest = [[first] * (bucket - 32) for first in range(4)]  # no beginning in common
    _, without = run_of(rest, dataclasses.replace(what, prompt_buckets=(bucket - 32,)), completions_per_prompt=3)
    turns = [multiplications(decoding.decode.trace(*each).jaxpr.jaxpr)["loop"] for each in (arguments, without)]
    rows, attention = len(run._slots.began), 2 * CONFIG.num_heads * CONFIG.head_dim
    assert turns[0] - turns[1] == CONFIG.num_layers * rows * attention * 32  # no place holds the beginning a second time


def test_caches_grow_and_the_batch_shrinks_while_completions_end(monkeypatch):
    """64 rows in blocks of 16 with limits from 1 to 100: programs of 64, 32 and 16 rows and of 32, 64, 96 and 100 columns, the same completions."""
    seen, original = [], decoding.decode

    def watched(*arguments):
        seen.append((len(arguments[7].ages), kv_cache.extent(arguments[6])[1]))
        return original(*arguments)

    monkeypatch.setattr(decoding, "decode", watched)
    what, rng = settings(max_new_tokens=100, stop_ids=()), np.random.default_rng(0)
    limits = np.sort(rng.integers(1, 101, 64)).astype(np.int32).reshape(4, 16)
    limits[-1, -1] = 100
    prompts = [*PROMPTS, [4, 4]]
    padded, lengths = engine.pad_prompts(prompts, buckets=what.prompt_buckets, pad_id=what.pad_id)
    out = engine.generate(TINY, PARAMS, padded, lengths, jax.random.key(1), completions_per_prompt=16, settings=what, limits=limits)
    assert {rows for rows, _ in seen} == {64, 32, 16} and {width for _, width in seen} == {32, 64, 96, 100}
    np.testing.assert_array_equal(out.lengths, limits.reshape(-1))
    np.testing.assert_allclose(out.log_probs, uncached(TINY, PARAMS, prompts, out), atol=1e-5)


def test_caches_become_narrow_again_when_old_completions_have_made_room(monkeypatch):
    """16 slots: 4 of the first lap end at token 90, 12 at 100; then the oldest has drawn 10, and 32 columns are enough until it has 32."""
    widths, original = [], decoding.decode

    def watched(*arguments):
        widths.append(kv_cache.extent(arguments[6])[1])
        return original(*arguments)

    monkeypatch.setattr(decoding, "decode", watched)
    limits = np.array([[100] * 4, [100] * 4, [100] * 4, [90] * 4] + [[70] * 4] * 4 + [[5] * 4], np.int32)
    prompts = [*PROMPTS, [4, 4], [5], [6, 1], [7, 7, 7], [9, 8], [3, 2]]
    padded, lengths = engine.pad_prompts(prompts, buckets=(5,), pad_id=2)
    what = settings(max_new_tokens=100, stop_ids=(), slots=16)
    out = engine.generate(TINY, PARAMS, padded, lengths, jax.random.key(1), completions_per_prompt=4, settings=what, limits=limits)
    assert [width for width, _ in itertools.groupby(widths)] == [32, 64, 96, 100, 32, 64, 96]
    np.testing.assert_array_equal(out.lengths, limits.reshape(-1))
    np.testing.assert_allclose(out.log_probs, uncached(TINY, PARAMS, prompts, out), atol=1e-5)


def rounded(params, storage):
    """Parameters as they come back from storage: each output of a matrix, each token of a table, is a vector with a scale."""
    axes = {"query": (1,), "key": (1,), "value": (1,), "output": (1, 2), "gate": (1,), "up": (1,), "down": (1,)}
    axes |= {"expert_gate": (2,), "expert_up": (2,), "expert_down": (2,)}

    def there_and_back(x, along):
        if storage == "bfloat16":
            return x.astype(jnp.bfloat16).astype(np.float32)
        scales = np.abs(x).max(axis=along, keepdims=True) / np.float32(127)
        return np.rint(x / scales) * scales

    inner = {name: there_and_back(x, axes[name]) if name in axes else x for name, x in params["layers"].items()}
    return params | {"layers": inner, "embedding": there_and_back(params["embedding"], (1,))}


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_stored_weights_are_those_that_come_back(storage):
    what = settings(max_new_tokens=30, stop_ids=(), weights=storage, slots=4)
    out = generate(PROMPTS, what)
    np.testing.assert_allclose(out.log_probs, uncached(TINY, rounded(PARAMS, storage), PROMPTS, out), atol=2e-5)
    assert np.abs(out.log_probs - uncached(TINY, PARAMS, PROMPTS, out)).max() > 1e-3


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_stored_experts_are_those_that_come_back_and_routers_are_exact(storage):
    config = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2, normalised_experts=True)
    model, params = transformer.Transformer(config), draw_params(config)
    out = generate(PROMPTS, settings(max_new_tokens=20, stop_ids=(), weights=storage, slots=4), model=model, params=params)
    np.testing.assert_allclose(out.log_probs, uncached(model, rounded(params, storage), PROMPTS, out), atol=2e-5)


@pytest.mark.parametrize("storage, nearest, farthest", [("bfloat16", 1e-4, 0.1), ("int8", 1e-3, 0.3)])
@pytest.mark.parametrize("slots", [0, 4])
def test_stored_caches_are_near_exact_ones(storage, nearest, farthest, slots):
    """What attention reads of them is exact in test_quantised; here they are filled, gathered, moved and turned round."""
    out = generate(PROMPTS, settings(max_new_tokens=50, stop_ids=(), cache=storage, slots=slots))
    gaps = np.abs(out.log_probs - uncached(TINY, PARAMS, PROMPTS, out))
    assert nearest < gaps.max() < farthest and gaps.mean() < farthest / 10


def test_limits_out_of_bounds_are_refused():
    padded, lengths = engine.pad_prompts(PROMPTS, buckets=(5,), pad_id=2)
    for limits in ([0, 1, 1], [1, 7, 1]):
        with pytest.raises(ValueError, match=rf"limits reach from {min(limits)} to {max(limits)} tokens, outside \[1, max_new_tokens = 6\]: clip"):
            engine.generate(TINY, PARAMS, padded, lengths, jax.random.key(0), completions_per_prompt=1, settings=settings(), limits=np.array(limits))


def test_prompts_are_padded_to_the_smallest_bucket_that_holds_them():
    padded, lengths = engine.pad_prompts([[5, 6], [7]], buckets=(2, 4), pad_id=9)
    np.testing.assert_array_equal(padded, [[5, 6], [7, 9]])
    np.testing.assert_array_equal(lengths, [2, 1])
    assert padded.dtype == lengths.dtype == np.int32
    assert [buckets.bucket_length(n, (2, 4, 9)) for n in (1, 2, 3, 4, 5, 9)] == [2, 2, 4, 4, 9, 9]


def test_impossible_prompts_are_refused():
    with pytest.raises(ValueError, match=r"prompt of 13 tokens .* largest bucket of 12: shorten it or extend generation.prompt_buckets"):
        engine.pad_prompts([[1], [1] * 13], buckets=(5, 12), pad_id=2)
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens, at least 1 is needed .*: leave the prompt out"):
        engine.pad_prompts([[1], [], [1]], buckets=(5, 12), pad_id=2)


def test_damaged_weights_are_refused():
    damaged = {**PARAMS, "final_norm": np.full(16, np.nan, np.float32)}
    with pytest.raises(FloatingPointError, match="log-probs of completion 0 are not finite: the weights are damaged"):
        generate(PROMPTS, settings(), params=damaged)
