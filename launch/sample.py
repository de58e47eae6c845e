"""Asks a policy: python launch/sample.py --config=configs/NAME.py [--workdir=DIR] [--prompt=TEXT] [--config.key=value ...]

The newest committed checkpoint of the run answers; without --workdir, or with --base, the untrained policy. Without --prompt lines are read: typed
at a terminal until Ctrl-D, or a prompt a line from a pipe. --held_out=N answers held-out prompts of the task and shows what the answers earn.
Answers go to standard output, all else to standard error.

    --preference_group=P    number or name: whose held-out prompts are answered
    --num_completions=N     answers to each prompt; 1
    --temperature=T         the run's if unset; 0 = greedy
    --max_new_tokens=N      tokens of an answer; the run's if unset

Exit status: 0 answered, 1 an error, or a prompt that could not be answered, said in one line, 130 interrupted.
"""

import contextlib
import pathlib
import sys
from typing import Iterator

from absl import flags

# So that the program works from any directory, whether or not the package is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch import command_line  # noqa: E402  (needs the path above)
from pgrpo_jax import sample  # noqa: E402

_FLAGS = {
    "preference_group": flags.DEFINE_string("preference_group", "", "number or name of a preference group; anyone if unset"),
    "prompt": flags.DEFINE_string("prompt", None, "answer this and exit"),
    "held_out": flags.DEFINE_integer("held_out", 0, "held-out prompts to answer and judge", lower_bound=0),
    "num_completions": flags.DEFINE_integer("num_completions", 1, "answers to each prompt", lower_bound=1),
    "temperature": flags.DEFINE_float("temperature", None, "0 = greedy; the run's if unset", lower_bound=0),
    "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "tokens of an answer; the run's if unset", lower_bound=1),
    "base": flags.DEFINE_bool("base", False, "the untrained policy answers"),
}
_OPTIONS = "[--prompt=TEXT] [--held_out=N] [--preference_group=P] [--num_completions=N] [--temperature=T] [--max_new_tokens=N] [--base]"


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.removesuffix("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (makes the line that is typed editable, in a Python that has it)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _say(text: str) -> None:
    print(text, flush=True)  # who reads from a pipe gets each answer when it is there


def main() -> None:
    """Runs the program."""
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # a line that is no text is refused by itself
    sys.stdout.reconfigure(errors="replace")
    try:
        command_line.run(
            lambda config, **run: sample.sample(
                config, **run, options=sample.Options(**{name: flag.value for name, flag in _FLAGS.items()}), lines=_lines(), say=_say
            ),
            required=(),
            options=_OPTIONS,
        )
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
