"""The task `movielens`: data set builds, access by index, rewards and baselines."""

import collections
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from pgrpo_jax import structs
from pgrpo_jax.tasks import movielens
from pgrpo_jax.tasks import movielens_dataset
from pgrpo_jax.tasks import movielens_prompts
from pgrpo_jax.tasks import title_matching


@pytest.fixture(scope="module")
def real_task(real_dir):
    return movielens.load(real_dir, seed=0, num_preference_groups=5)


def example(**changes) -> structs.Prompt:
    facts = {
        "candidates": ["The Edge", "Alien", "Batman", "L'Enfer"],
        "names": ["edge", "alien", "batman", "enfer|lenfer"],
        "decoys": ["batman returns"],
        "ratings": [5, 1, 4, 2],
        "popular": 2,
    }
    return structs.Prompt(prompt_id="test-1-0", text="…", preference_id=0, facts=facts | changes)


def digests(directory: str) -> dict[str, str]:
    files = sorted(path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "answer, total, answered, choice",
    [
        ("The Edge", 1.0, 1.0, 0),
        ("Edge, The (1997)", 1.0, 1.0, 0),
        ("Alien", 0.2, 1.0, 1),
        ("Batman and Batman", 0.8, 1.0, 2),
        ("L'Enfer (Hell)", 0.4, 1.0, 3),
        ("Alien, or The Edge", 0.0, 0.0, None),
        ("Batman Returns", 0.0, 0.0, None),
        ("Aliens", 0.0, 0.0, None),
        ("", 0.0, 0.0, None),
    ],
)
def test_reward_by_hand(real_task, answer, total, answered, choice):
    reward = real_task.reward(example(), answer)
    assert reward.total == total
    assert reward.components == {"answered": answered, "rating": total}
    assert real_task.choice(example(), answer) == choice
    judge = movielens.load_judge("nowhere", seed=0, num_preference_groups=5)  # without the data
    assert judge.reward(example(), answer) == reward and judge.choice(example(), answer) == choice
    assert tuple(reward.components) == judge.reward_components == real_task.reward_components


def test_two_builds_are_byte_identical_and_keyed(synthetic_dir, tmp_path):
    def build(cache, seed=0, k=2):
        return movielens_dataset.prepared_dir(synthetic_dir, cache_dir=str(tmp_path / cache), seed=seed, num_preference_groups=k)

    first, second = build("one"), build("two")
    assert digests(first) == digests(second)
    assert sum("array_record" in name for name in digests(first)) == 2
    assert build("one") == first
    assert len({first, build("one", seed=1), build("one", k=3)}) == 3
    assert digests(build("one", seed=1)) != digests(first)
    with open(f"{synthetic_dir}/ml-100k.inter", "a", encoding="utf-8") as file:
        file.write("1\t1\t3\t999999\n")
    assert build("one") != first


@pytest.mark.parametrize("module", [movielens_dataset, movielens_prompts, title_matching])
def test_other_code_makes_another_data_set(synthetic_dir, tmp_path, monkeypatch, module):
    def built():
        return movielens_dataset.prepared_dir(synthetic_dir, cache_dir=str(tmp_path / "cache"), seed=0, num_preference_groups=2)

    before = built()
    changed = tmp_path / "changed.py"
    changed.write_text(pathlib.Path(module.__file__).read_text() + "# another record format\n")
    monkeypatch.setattr(module, "__file__", str(changed))
    assert built() != before


def test_a_build_in_another_process_is_byte_identical(synthetic_dir, tmp_path):
    """In one process even protobuf's maps keep their order; a cache outlives the process that built it."""
    program = (
        "import sys; from pgrpo_jax.tasks import movielens_dataset as d; "
        "print(d.prepared_dir(sys.argv[1], cache_dir=sys.argv[2], seed=0, num_preference_groups=2))"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program, synthetic_dir, str(tmp_path / "other")]
    other = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, timeout=120).stdout.strip()
    mine = movielens_dataset.prepared_dir(synthetic_dir, cache_dir=str(tmp_path / "mine"), seed=0, num_preference_groups=2)
    assert other != mine and digests(other) == digests(mine)


def test_two_real_builds_are_byte_identical(real_dir, real_task, tmp_path):
    caches = (pathlib.Path(real_dir).parent / "tfds", tmp_path)  # the one that `real_task` reads, and a new one
    built = [movielens_dataset.prepared_dir(real_dir, cache_dir=str(cache), seed=0, num_preference_groups=5) for cache in caches]
    assert digests(built[0]) == digests(built[1])


def test_a_killed_build_is_built_again(synthetic_dir, tmp_path, monkeypatch):
    whole = movielens_dataset.prepared_dir(synthetic_dir, cache_dir=str(tmp_path / "whole"), seed=0, num_preference_groups=2)
    write_prompts = movielens_prompts.write_prompts

    def killed(*args, split, **kwargs):
        if split == "test":
            raise KeyboardInterrupt
        return write_prompts(*args, split=split, **kwargs)

    cache = str(tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(movielens_prompts, "write_prompts", killed)
        with pytest.raises(KeyboardInterrupt):
            movielens_dataset.prepared_dir(synthetic_dir, cache_dir=cache, seed=0, num_preference_groups=2)
    assert not list(pathlib.Path(cache).rglob("dataset_info.json"))
    again = movielens_dataset.prepared_dir(synthetic_dir, cache_dir=cache, seed=0, num_preference_groups=2)
    assert digests(again) == digests(whole)


def test_an_epoch_shows_every_prompt_once_and_the_next_in_another_order(synthetic_dir):
    task = movielens.load(synthetic_dir, seed=0, num_preference_groups=2)
    size = task.num_prompts("train")
    first = [prompt.prompt_id for prompt in task.prompts("train", 0, size)]
    second = [prompt.prompt_id for prompt in task.prompts("train", 1, size)]
    assert size > 50 and len(set(first)) == size
    assert sorted(first) == sorted(second) and first != second
    assert movielens.load(synthetic_dir, seed=1, num_preference_groups=2).prompts("train", 0, 8) != task.prompts("train", 0, 8)


def test_access_by_index_equals_going_through_in_order(real_task):
    in_order = [prompt for batch in range(3) for prompt in real_task.prompts("train", batch, 8)]
    assert [real_task.prompts("train", i, 1)[0] for i in reversed(range(24))] == in_order[::-1]
    assert len({prompt.facts["user"] for prompt in in_order}) > 12  # not one user after the other
    tests = real_task.num_prompts("test")
    assert real_task.prompts("test", 1, tests) == real_task.prompts("test", 0, tests)
    assert real_task.prompts("test", 0, tests + 2)[-2:] == real_task.prompts("test", 0, 2)
    assert len({prompt.facts["user"] for prompt in real_task.prompts("test", 0, tests)}) == tests >= 128


def test_a_second_load_gives_the_same_stream(real_dir, real_task):
    again = movielens.load(real_dir, seed=0, num_preference_groups=5)
    assert again.prompts("train", 5, 16) == real_task.prompts("train", 5, 16)
    assert again.preference_group_names == real_task.preference_group_names
    assert len(again.preference_group_names) == 5 and all(again.preference_group_names)


def test_facts_are_what_was_written_and_json_can_hold_them(real_dir, real_tables, real_task):
    preparation = movielens_prompts.prepare(real_tables, seed=0, num_preference_groups=5)
    for split in ("train", "test"):
        records = {r["prompt_id"]: r for r in movielens_prompts.write_prompts(real_tables, preparation, seed=0, split=split)}
        assert len(records) == real_task.num_prompts(split)
        for prompt in real_task.prompts(split, 0, 50):
            facts = json.loads(json.dumps(dict(prompt.facts)))
            found = facts | {"prompt_id": prompt.prompt_id, "text": prompt.text, "preference_id": prompt.preference_id}
            assert found == records[prompt.prompt_id]


def test_baselines_against_a_loop(real_tables, real_task):
    preparation = movielens_prompts.prepare(real_tables, seed=0, num_preference_groups=5)
    by_title = {}
    for user, film, stars, in_history in zip(real_tables.user, real_tables.film, real_tables.rating, preparation.in_history):
        if in_history and preparation.is_train[user]:
            by_title.setdefault(film, []).append(int(stars))
    overall = np.mean([stars for ratings in by_title.values() for stars in ratings])
    name_to_film = {name: i for i, film in enumerate(real_tables.films) for name in film.names}
    twice = {name for name, times in collections.Counter(n for film in real_tables.films for n in film.names).items() if times > 1}
    compared = 0
    prompts = real_task.prompts("test", 0, 60)
    baselines = real_task.baselines(prompts)
    assert set(baselines) == {"random", "popular"} and baselines["random"].shape == baselines["popular"].shape == (60,)
    for i, prompt in enumerate(prompts):
        answers = [real_task.reward(prompt, title).total for title in prompt.facts["candidates"]]
        assert baselines["random"][i] == pytest.approx(sum(answers) / 4, rel=1e-12)
        main_names = [names.split("|")[0] for names in prompt.facts["names"]]
        if twice & set(main_names):
            continue  # "Sabrina" is two films: the loop would have to guess
        films = [name_to_film[name] for name in main_names]
        means = [(sum(by_title.get(film, [])) + 5 * overall) / (len(by_title.get(film, [])) + 5) for film in films]
        assert baselines["popular"][i] == answers[int(np.argmax(means))]
        compared += 1
    assert compared > 50


def test_bad_arguments(real_task, synthetic_dir, tmp_path, table_writer):
    for call, message in (
        (lambda: real_task.prompts("valid", 0, 1), "split is 'valid', none of"),
        (lambda: real_task.num_prompts("valid"), "split is 'valid', none of"),
        (lambda: real_task.prompts("train", -1, 1), "batch_index is -1"),
        (lambda: real_task.prompts("train", 0, 0), "batch_size 0"),
        (lambda: movielens.load(synthetic_dir, seed=-1, num_preference_groups=2), "seed is -1"),
        (lambda: movielens.load(synthetic_dir, seed=0, num_preference_groups=0), r"num_preference_groups is 0, outside \[1, 50\]"),
        (lambda: movielens.load(synthetic_dir, seed=0, num_preference_groups=51), r"num_preference_groups is 51, outside \[1, 50\]"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"ml-100k.inter is missing: .*\./launch/local.sh"):
        movielens.load(str(tmp_path / "nowhere"), seed=0, num_preference_groups=2)
    table_writer(tmp_path / "few", items=["1\tAlien\t1979\tSci-Fi"], users=["1\t3", "2\t3"], ratings=["1\t1\t3\t1", "2\t1\t3\t1"])
    with pytest.raises(ValueError, match="split 'train' holds 0 prompts from 2 users"):
        movielens.load(str(tmp_path / "few"), seed=0, num_preference_groups=1)


def test_a_preference_id_out_of_range_is_refused(real_task):
    narrower = movielens.MovieLens(
        num_preference_groups=1,
        preference_group_names=real_task.preference_group_names[:1],
        split_sizes=real_task.split_sizes,
        streams=real_task.streams,
    )
    with pytest.raises(ValueError, match=r"preference id [1-4] is outside \[0, 1\)"):
        narrower.prompts("train", 0, 50)
