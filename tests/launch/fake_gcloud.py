"""Stands for gcloud and Google's side of it in the tests of tpu_pod.sh: records its calls, and keeps one queued resource in a file.

    fake_gcloud.py STATE_DIRECTORY ARGUMENT ...

`outcomes` in the directory has a line for each training: an exit code, "preempted" (the slice goes away in the middle), "lost" (only the
connection does) or "waits" (until it is killed). A file `hangs` names a verb that never comes back.
"""

import json
import pathlib
import signal
import sys
import tarfile

directory, arguments = pathlib.Path(sys.argv[1]), sys.argv[2:]
state_file = directory / "state"


def state():
    """The state of the queued resource, "" where there is none."""
    return state_file.read_text() if state_file.exists() else ""


def next_line(name):
    """Takes the first line off a file."""
    line, _, rest = (directory / name).read_text().partition("\n")
    (directory / name).write_text(rest)
    return line


def train():
    """Ends as the next outcome says."""
    outcome = next_line("outcomes")
    if outcome == "preempted":
        state_file.write_text("SUSPENDED")
    if outcome == "waits":
        print("training", flush=True)
        signal.pause()
    return 255 if outcome in ("preempted", "lost") else int(outcome)


def queued_resources(verb):
    """create, describe and delete; a new request is given a slice at the third look at it."""
    if verb == "create":
        if state():
            sys.exit("ALREADY_EXISTS")
        state_file.write_text("ACCEPTED")
    elif not state():
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    elif verb == "delete":
        state_file.unlink()
    else:
        print(state())
        follows = {"ACCEPTED": "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES": (directory / "granted").read_text()}
        state_file.write_text(follows.get(state(), state()))
    return 0


def tpu_vm(verb):
    """describe, scp and ssh."""
    if verb == "describe":
        print("READY" if state() == "ACTIVE" else "PREEMPTED")
        return 0
    if state() != "ACTIVE":
        return 255
    if verb == "scp":
        with tarfile.open(arguments[4]) as archive:
            (directory / "archived").write_text("\n".join(archive.getnames()))
    command = next((a for a in arguments if a.startswith("--command=")), "")
    return train() if "tpu_worker.sh run" in command else 0


with (directory / "calls").open("a") as file:
    print(json.dumps(arguments), file=file)
assert arguments[:2] == ["compute", "tpus"], arguments
if (directory / "hangs").exists() and (directory / "hangs").read_text() == arguments[3]:
    print(arguments[3], "hangs", flush=True)
    signal.pause()
sys.exit({"queued-resources": queued_resources, "tpu-vm": tpu_vm}[arguments[2]](arguments[3]))
