"""The programs from outside: what is wrong is said in lines, with exit status 1, and touches nothing."""

import os
import re
import shutil
import sys

import program
import pytest

OPTIONS = "options are --config=configs/NAME.py --workdir=DIR [--config.key=value ...]"


def train(*arguments, cwd=program.ROOT):
    return program.run([sys.executable, str(program.ROOT / "launch" / "train.py"), *arguments], cwd=cwd)


WRONG = {
    "unknown keys": (
        ["--config=configs/smoke.py", "--config.num_step=3", "--config.nope.x=1", "--noconfig.metrics.tensorbord"],
        [
            "configuration key 'num_step' is unknown, did you mean 'num_steps': see configs/base.py for every key",
            "configuration key 'nope.x' is unknown: see configs/base.py for every key",
            "configuration key 'metrics.tensorbord' is unknown, did you mean 'metrics.tensorboard': see configs/base.py for every key",
        ],
    ),
    "no such file": (["--config=configs/nope.py"], [f"[Errno 2] No such file or directory: 'configs/nope.py': {OPTIONS}"]),
    "a value of another type": (
        ["--config=configs/smoke.py", "--config.num_steps=many"],
        [f"flag --config.num_steps=many: invalid literal for int() with base 10: 'many': {OPTIONS}"],
    ),
    "an unknown flag": (["--config=configs/smoke.py", "--steps=3"], [f"Unknown command line flag 'steps': {OPTIONS}"]),
    "a stray argument": (["--config=configs/smoke.py", "smoke"], [f"argument 'smoke' is unexpected: {OPTIONS}"]),
    "no configuration": ([], [f"flag --config=None: Flag --config must have a value other than None: {OPTIONS}"]),
    "values out of bounds": (
        ["--config=configs/smoke.py", "--config.preset=ppo", "--config.prompts_per_work=3", "--config.completions_per_prompt=1"],
        [
            "completions_per_prompt = 1 is below 2: one completion has nothing to be compared with; set it to at least 2",
            "preset is 'ppo', must be one of cispo, dapo, dr_grpo, grpo, gspo, p_grpo, reinforce, reinforce_pp, rloo: set config.preset",
            "prompts_per_step = 8 is not divisible by prompts_per_work = 3: change one of them",
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_the_command_line(case, tmp_path):
    arguments, lines = WRONG[case]
    assert program.errors(train(*arguments, f"--workdir={tmp_path / 'run'}")) == lines
    assert not (tmp_path / "run").exists()


def test_a_faulty_configuration_file(tmp_path):
    (tmp_path / "faulty.py").write_text("from configs import base\ndef get_config():\n    base.get_config().nope = 1\n")
    lines = program.errors(train(f"--config={tmp_path / 'faulty.py'}", f"--workdir={tmp_path / 'run'}"))
    assert len(lines) == 1 and "nope" in lines[0]


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    lines = program.errors(program.run(program.command(tmp_path / "file")))
    assert lines == [f"--workdir {tmp_path / 'file'}: {tmp_path / 'file'} is a file, a directory is needed: give another path"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    lines = program.errors(program.run(program.command(tmp_path / "run")))
    assert lines == [f"--workdir {tmp_path / 'run'}: {tmp_path} may not be written to: give another path or change its permissions"]


def test_a_corrupt_checkpoint_and_one_of_another_run(undisturbed, cache, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    before = program.files(workdir)
    lines = program.errors(program.run(program.command(workdir, **program.LONG, seed=1), cache=cache))
    assert len(lines) == 1 and "belongs to another run (seed: 0 there, 1 here): use another --workdir" in lines[0]
    assert program.files(workdir) == before
    record = workdir / "checkpoints" / "40" / "record" / "metadata"
    record.write_bytes(record.read_bytes()[:-9])
    before = program.files(workdir)
    lines = program.errors(program.run(program.command(workdir, **program.LONG), cache=cache))
    remedy = "delete that directory to go on from the step before it"
    assert len(lines) == 1 and re.fullmatch(rf"checkpoint \S+/40 is corrupt \(.*\): {remedy}", lines[0])
    assert program.files(workdir) == before


def test_evaluate_shows_the_newest_checkpoint(undisturbed, cache):
    before = program.files(undisturbed)
    done = program.run(program.command(undisturbed, program="evaluate", **program.LONG), cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    record = program.summary(undisturbed)["evaluation"]["after"]
    assert done.stdout.startswith(f"step 40 of {undisturbed}\n") and "held-out evaluation" in done.stdout
    assert f"worst preference group {record['worst_preference_group']}, gap between best and worst {record['gap']:.3f}" in done.stdout
    for name in ("likes", "over random", "95 % interval", "most popular candidate"):
        assert name in done.stdout
    assert program.files(undisturbed) == before


def test_evaluate_without_a_checkpoint(tmp_path):
    lines = program.errors(program.run(program.command(tmp_path / "run", program="evaluate")))
    assert lines == [f"no committed checkpoint in {tmp_path / 'run' / 'checkpoints'}: give the --workdir of a run that has saved one"]
    assert not (tmp_path / "run").exists()


def test_the_programs_work_from_any_directory(tmp_path):
    """Without the package being on the path: the error comes from the last check before the model."""
    config = f"--config={program.ROOT / 'configs' / 'smoke.py'}"
    lines = program.errors(train(config, "--workdir=run", "--config.generation.prompt_buckets=8", cwd=tmp_path))
    assert lines == ["prompt of 23 tokens is longer than the largest bucket of 8: shorten it or extend generation.prompt_buckets"]
    assert not (tmp_path / "run").exists()


def test_where_an_error_was_raised_is_shown_on_request(tmp_path):
    (tmp_path / "file").write_text("")
    done = program.run([*program.command(tmp_path / "file"), "--verbosity=0"])
    assert done.returncode == 1 and "Traceback" in done.stderr and "check_workdir" in done.stderr


