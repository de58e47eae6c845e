"""launch/export.py and launch/sample.py as processes: killed and stopped, in pipes and at a terminal, on a run that they leave as it is."""

import os
import pty
import subprocess

import jax
import numpy as np
import program
import pytest

from pgrpo_jax.models import tokenizer, weights

EXPORT_OPTIONS = "options are --config=configs/NAME.py --workdir=DIR --output=NEW [--dtype=float32|float16|bfloat16] [--preference_group=P] [--config.key=value ...]"


def export(workdir, output, *flags, at=None):
    return [*program.command(workdir, program="export", at=at, **program.LONG), f"--output={output}", *flags]


def ask(workdir, *flags):
    return [*program.command(workdir, program="sample", **program.LONG), *flags]


def piped(line, text, cache):
    return subprocess.run(line, cwd=program.ROOT, env=program.environment(cache), input=text, capture_output=True, timeout=program.TIMEOUT_SECS, check=False)


@pytest.fixture(scope="module")
def exported(undisturbed, cache, tmp_path_factory):
    output, before = tmp_path_factory.mktemp("exported") / "model", program.files(undisturbed)
    done = program.run(export(undisturbed, output), cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"step 40 of {undisturbed}: 5,728 parameters in float32 are in {output}\n"
    assert program.files(undisturbed) == before
    return output


def test_a_run_becomes_a_directory_that_a_run_begins_with(exported, cache, tmp_path):
    config, params = weights.load(exported)
    assert config.num_layers == 1 and sum(leaf.size for leaf in jax.tree.leaves(params)) == 5728
    assert tokenizer.load(exported).render_chat("ab") == [256, 97, 98, 10]
    line = program.command(tmp_path / "next", model__path=str(exported), num_steps=1)
    done = program.run(line, cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    done = program.run([*program.command(tmp_path / "next", program="export", model__path=str(exported), num_steps=1), f"--output={tmp_path / 'again'}"], cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    config_again, again = weights.load(tmp_path / "again")
    assert config_again == config and not np.array_equal(again["embedding"], params["embedding"])


def test_a_kill_while_it_is_written_leaves_no_directory_and_the_next_one_is_whole(undisturbed, exported, cache, tmp_path):
    output, at = tmp_path / "model", ["SIGKILL", "before:pgrpo_jax.export:_sync", 1]
    done = program.run(export(undisturbed, output, at=at), cache=cache)
    assert done.returncode == -9 and not output.exists()
    (left,) = tmp_path.iterdir()  # everything was written by then, beside the place
    assert left.name.startswith(".model.partial-") and (left / "model" / "model.safetensors").exists()
    done = program.run(export(undisturbed, output), cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert program.files(output) == program.files(exported)


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_a_signal_leaves_nothing(signal, undisturbed, cache, tmp_path):
    done = program.run(export(undisturbed, tmp_path / "model", at=[signal, "before:pgrpo_jax.export:write", 1]), cache=cache)
    assert (done.returncode, done.stderr) == (75, "") and "nothing is written; run the same command again" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--dtype=int8"], f"flag --dtype=int8: value should be one of <float32|float16|bfloat16>: {EXPORT_OPTIONS}"),
        (["--output="], "--output is empty: give a directory to make"),
        (["--shards=2"], f"Unknown command line flag 'shards': {EXPORT_OPTIONS}"),
        ([], "--output {out} is there already: give a new directory, or delete it"),
        (["--output={new}"], "no committed checkpoint in {run}/checkpoints: give the --workdir of a run that has saved one"),
    ],
)
def test_what_is_wrong_with_an_export(flags, line, tmp_path):
    out, run, new = tmp_path / "out", tmp_path / "run", tmp_path / "new" / "model"
    out.mkdir(), (out / "kept").touch()
    lines = program.errors(program.run(export(run, out, *(flag.format(new=new) for flag in flags))))
    assert lines == [line.format(out=out, run=run)]
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


def test_lines_of_a_pipe(undisturbed, cache):
    before = program.files(undisturbed)
    text = b"user 1 likes: a e q\n\n" + b"x" * 300 + b"\n\xff\nuser 1 likes: a e q"
    done = piped(ask(undisturbed, "--num_completions=2"), text, cache)
    said, noted = done.stdout.decode(), done.stderr.decode().splitlines()
    assert done.returncode == 1 and noted[0] == f"step 40 of {undisturbed}, temperature 1"
    assert [line.split(":")[0] for line in noted[1:]] == ["error", "error"] and "has 302 tokens, at most 252" in noted[1] and "lone surrogate" in noted[2]
    alone = program.run(ask(undisturbed, "--num_completions=2", "--prompt=user 1 likes: a e q"), cache=cache)
    assert alone.returncode == 0 and alone.stdout and said == 2 * alone.stdout
    base = program.run(ask(undisturbed, "--num_completions=2", "--prompt=user 1 likes: a e q", "--base"), cache=cache)
    assert base.stderr == "the untrained policy (random), temperature 1\n" and base.stdout != alone.stdout
    assert program.files(undisturbed) == before


def test_held_out_prompts(undisturbed, cache):
    done = program.run(ask(undisturbed, "--held_out=2", "--preference_group=likes cgkosw"), cache=cache)
    assert done.returncode == 0 and done.stdout.count(", preference group 2 (likes cgkosw)\nuser ") == 2


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--preference_group=3"], "--preference_group=3 is unknown: give a number, or the name in brackets, of 0 (likes aeimquy), 1 (likes bfjnrvz), 2 (likes cgkosw)"),
        (["--prompt=x"], "no committed checkpoint in {run}/checkpoints: give the --workdir of a run that has saved one"),
        (["--prompt=x", "--held_out=1"], "--prompt and --held_out=1 are both given: choose one"),
    ],
)
def test_what_is_wrong_with_a_question(flags, line, tmp_path):
    assert program.errors(program.run(ask(tmp_path / "run", *flags))) == [line.format(run=tmp_path / "run")]
    assert list(tmp_path.iterdir()) == []


def test_at_a_terminal(cache):
    """A line typed is answered, a prompt that is too long is said, and Ctrl-D ends it; without a run the untrained policy answers."""
    line = [argument for argument in ask("unused", "--temperature=0") if not argument.startswith("--workdir")]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        line, cwd=program.ROOT, env=program.environment(cache) | {"TERM": "dumb"}, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=False
    )
    os.close(theirs)
    shown = b""

    def until_asked(times):
        nonlocal shown
        while shown.count(b"> ") < times:
            shown += os.read(ours, 1024)

    until_asked(1)
    os.write(ours, b"user 1 likes: a e q\n")
    until_asked(2)
    os.write(ours, b"x" * 300 + b"\n")
    until_asked(3)
    os.write(ours, b"\x04")
    assert process.wait(program.TIMEOUT_SECS) == 1
    noted = process.stderr.read().decode().splitlines()
    process.stderr.close()
    os.close(ours)
    assert noted[0] == "the untrained policy (random), greedy" and "the prompt has 302 tokens" in noted[1] and len(noted) == 2
    alone = program.run([*line, "--prompt=user 1 likes: a e q"], cache=cache)
    assert alone.returncode == 0 and alone.stdout.strip().encode() in shown.replace(b"\r\n", b"\n")
