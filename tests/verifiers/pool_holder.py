"""A program that holds a reward pool, for tests that kill it: python pool_holder.py WHAT DIRECTORY. Its lines of code run once."""

import functools
import pathlib
import sys
import time

what, directory = sys.argv[1], pathlib.Path(sys.argv[2])
with (directory / "imports").open("a") as file:
    file.write("main\n")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import reward_cases  # noqa: E402
from pgrpo_jax.verifiers.rewards import RewardPool  # noqa: E402


def load():
    """Can not be imported in another process: it is of the program."""
    return reward_cases.Misbehaving()


fault = {"loading": "sleep", "exits_loading": "exit"}.get(what, "")
make_task = load if what == "local" else functools.partial(reward_cases.load, fault, str(directory / "pids"))
pool = RewardPool(make_task, num_processes=1, timeout_secs=600.0, on_failure="fail")
if what == "leaves":  # without closing
    print(int(pool.judge(reward_cases.prompts(1), ["lineage"])[0][0].components["answered"]))
elif what == "loading":
    time.sleep(600)
else:
    answer = {"judging": f"spawn {directory / 'pids'}"}.get(what, "print 10")
    try:
        print(pool.judge(reward_cases.prompts(1), [answer])[0][0].total)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}")
    pool.close()
