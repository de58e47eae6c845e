"""Runs a program and sends this process a real signal at an exact moment: signal_at.py SIGNAL MOMENT COUNT PROGRAM [ARGUMENT ...]

MOMENT is "import:MODULE", when MODULE starts to be imported, or "before:", "after:" or "during:" and MODULE:NAME, at the COUNT-th call of
that function or method; "during" sends the signal from another thread, a while after the call started.
"""

import functools
import importlib
import importlib.abc
import os
import pathlib
import runpy
import signal
import sys
import threading

DURING_SECS = 0.2


class ImportWatch(importlib.abc.MetaPathFinder):
    """Finds nothing; sends the signal when asked for the module."""

    def __init__(self, name, send):
        self._name, self._send = name, send

    def find_spec(self, fullname, path, target=None):
        if fullname == self._name:
            self._send()


def wrap(target, place, count, send):
    """Replaces a function by itself with the signal before, after or during one of its calls."""
    module_name, name = target.split(":")
    *owners, attribute = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module_name))
    function, calls = getattr(owner, attribute), []

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == count and place == "before":
            send()
        if len(calls) == count and place == "during":
            threading.Timer(DURING_SECS, send).start()
        result = function(*args, **kwargs)
        if len(calls) == count and place == "after":
            send()
        return result

    setattr(owner, attribute, wrapped)


def main():
    number, moment, count, program, *arguments = sys.argv[1:]
    root = pathlib.Path(__file__).parents[2]
    sys.path.insert(0, str(root))
    place, target = moment.split(":", 1)
    send = functools.partial(os.kill, os.getpid(), getattr(signal, number))
    if place == "import":
        sys.meta_path.insert(0, ImportWatch(target, send))
    else:
        wrap(target, place, int(count), send)
    sys.argv = [program, *arguments]
    runpy.run_path(str(root / program), run_name="__main__")


if __name__ == "__main__":
    main()
