"""The command line of the programs that take a configuration: --config=configs/NAME.py --workdir=DIR [--config.key=value ...]

Whatever is wrong is said in lines that begin with "error:", and the exit status is 1; --verbosity=0 adds where it was raised.
"""

import difflib
import functools
import re
import sys
from typing import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from configs import base
from pgrpo_jax import compile_cache, run_directory

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; may be a bucket")


def run(program: Callable[..., int], *, required: Sequence[str] = ("workdir",), options: str = "") -> None:
    """Runs a program and exits with its status.

    Args:
        program: called as program(config, identity=…, workdir=…), workdir None where it is left out; the ValueError, OSError or
            FloatingPointError it raises is a message for a person, one error a line.
        required: flags that may not be left out, beside --config.
        options: the program's own flags, as the usage line lists them.
    """
    flags.mark_flags_as_required(["config", *required])
    workdir = "--workdir=DIR" if "workdir" in required else "[--workdir=DIR]"
    usage = " ".join(filter(None, ("options are --config=configs/NAME.py", workdir, options, "[--config.key=value ...]")))
    app.run(functools.partial(_main, program), flags_parser=functools.partial(_parse, usage))


def _main(program: Callable[..., int], argv: Sequence[str]) -> int:
    del argv
    if not flags.FLAGS["verbosity"].present:  # libraries log every file they touch
        logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value
    try:
        if _WORKDIR.value is not None:
            run_directory.check_workdir(_WORKDIR.value)
            compile_cache.use(config.compile_cache, workdir=_WORKDIR.value)
        return program(config, identity=base.identity(config), workdir=_WORKDIR.value)
    except (ValueError, OSError, FloatingPointError) as error:
        logging.info("raised here", exc_info=True)
        return _complain(str(error).splitlines())


def _parse(usage: str, argv: Sequence[str]) -> list[str]:
    """Sets the flags. An unknown key would leave ml_collections as a traceback, so the keys are looked up first."""
    keys = [match[1] for argument in argv[1:] if (match := re.match(r"--?(?:no)?config\.([^=]*)", argument))]
    unknown = [key for key in keys if key not in base.KEYS]
    errors = [f"configuration key {key!r} is unknown{_close_to(key)}: see configs/base.py for every key" for key in unknown]
    if not errors:
        errors = _set_flags(argv, usage)
    if errors:
        sys.exit(_complain(errors))
    return list(argv[:1])


def _set_flags(argv: Sequence[str], usage: str) -> list[str]:
    try:
        unexpected = flags.FLAGS(argv)[1:]
        base.identity(_CONFIG.value)  # a file that could not be read shows only here
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        reason = str(error).strip().splitlines()[-1]  # on the lines before, ml_collections tells how it looked
        return [f"{reason.strip().rstrip('.')}: {usage}"]
    return [f"argument {argument!r} is unexpected: {usage}" for argument in unexpected]


def _close_to(key: str) -> str:
    close = difflib.get_close_matches(key, base.KEYS, n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _complain(errors: Sequence[str]) -> int:
    print("\n".join(f"error: {line}" for line in errors), file=sys.stderr)
    return 1
