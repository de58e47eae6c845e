"""Runs a program and writes what JAX compiled and what it found in its cache: count_compilations.py FILE PROGRAM [ARGUMENT ...]"""

import collections
import json
import pathlib
import runpy
import sys

import jax

ROOT = pathlib.Path(__file__).parents[2]
PREFIX = "/jax/compilation_cache/"


def main():
    counts = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.removeprefix(PREFIX)]))
    target, program, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    finally:
        pathlib.Path(target).write_text(json.dumps({name: counts[name] for name in ("compile_requests_use_cache", "cache_hits", "cache_misses")}))


if __name__ == "__main__":
    main()
