"""launch/gke: the manifests against schemas, what they run against the program's own flags, and submit.py's commands."""

import functools
import json
import pathlib
import shlex
import subprocess
import sys

import jsonschema
import pytest
import ray
import yaml
from ray._private.accelerators import tpu

from launch.gke import submit
from pgrpo_jax.preemption import EXIT_PREEMPTED

ROOT = pathlib.Path(__file__).parents[2]
SCHEMAS = json.loads((ROOT / "tests" / "data" / "kubernetes_schemas.json").read_text())
RUN = ("--name=run-1", "--image=registry.example/pgrpo:1", "--config=configs/movielens.py", "--workdir=gs://bucket/a run")
PRINT_ARGUMENTS = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"


def documents(what, *options):
    """The rendered documents of one kind of submission."""
    return list(yaml.safe_load_all(submit.manifest(submit.parse([what, *RUN, *options]))))


def check(document):
    schema = {"$ref": f"#/definitions/{document['kind']}", "definitions": SCHEMAS["definitions"]}
    jsonschema.validate(document, schema, cls=jsonschema.Draft7Validator)


def pods(document):
    """(pods at once, pod template) of everything that a document makes."""
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    if document["kind"] == "JobSet":
        jobs = [job["template"]["spec"] for job in spec["replicatedJobs"]]
        return [(job["parallelism"], job["template"]) for job in jobs]
    workers = [(pool["replicas"] * pool["numOfHosts"], pool["template"]) for pool in spec["workerGroupSpecs"]]
    return [(1, spec["headGroupSpec"]["template"]), *workers]


def submitted(what, *options):
    """(exit status, output, errors) of the program."""
    command = [sys.executable, str(ROOT / "launch" / "gke" / "submit.py"), what, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_schemas_are_schemas():
    jsonschema.Draft7Validator.check_schema(SCHEMAS)


@pytest.mark.parametrize("options", [
    (),
    ("--generation=v6e", "--topology=16x16", "--num-actors=0"),
    ("--generation=v5p", "--topology=2x2x4", "--actor-topology=2x2x1"),
])  # fmt: skip
@pytest.mark.parametrize("what, kinds", [
    ("rayjob", ["RayJob"]),
    ("raycluster", ["RayCluster"]),
    ("jobset", ["JobSet"]),
    ("kueue", ["ResourceFlavor", "ResourceFlavor", "ClusterQueue", "LocalQueue"]),
])  # fmt: skip
def test_manifests_are_valid(what, kinds, options):
    found = documents(what, *options)
    assert [document["kind"] for document in found] == kinds
    for document in found:
        check(document)


def spoil(document, path, value):
    """A copy of a document with another value at a dotted path."""
    document = json.loads(json.dumps(document))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    functools.reduce(lambda node, part: node[part], parents, document)[last] = value
    return document


@pytest.mark.parametrize("what, path, value", [
    ("rayjob", "spec.backofLimit", 3),
    ("rayjob", "spec.submissionMode", "K8sMode"),
    ("rayjob", "spec.rayClusterSpec.authOptions.mode", "none"),
    ("rayjob", "spec.rayClusterSpec.workerGroupSpecs.0.numOfHosts", "4"),
    ("rayjob", "spec.rayClusterSpec.headGroupSpec.rayStartParams", {"num-cpus": 0}),
    ("jobset", "spec.failurePolicy.rules.0.action", "Restart"),
    ("jobset", "spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.values", [0]),
    ("jobset", "spec.replicatedJobs.0.template.spec.template.spec.nodeSelectors", {}),
    ("jobset", "metadata.name", "Run_1"),
])  # fmt: skip
def test_the_schemas_refuse_mistakes(what, path, value):
    (document,) = documents(what)
    with pytest.raises(jsonschema.ValidationError):
        check(spoil(document, path, value))


@pytest.mark.parametrize("generation, topology, hosts", [
    ("v4", "2x2x4", 4), ("v5e", "2x2", 1), ("v5e", "2x4", 1), ("v5e", "4x4", 4), ("v5p", "4x4x4", 16), ("v6e", "16x16", 64),
])  # fmt: skip
def test_slices_have_the_hosts_that_ray_counts(generation, topology, hosts):
    found = submit.slice_of(generation, topology)
    assert found.hosts == hosts and found.hosts * found.chips_per_host == found.chips == tpu.get_num_chips_from_topology(topology)
    assert found.chips_per_host == tpu.get_chips_per_host(topology, submit.GENERATIONS[generation].ray)


@pytest.mark.parametrize("what", ["rayjob", "raycluster", "jobset"])
def test_pods_fill_their_slices(what):
    """A slice schedules as a whole: as many pods as hosts, each with all chips of its host, on a spot node of that shape."""
    (document,) = documents(what, "--topology=4x8", "--actor-topology=4x4", "--num-actors=3")
    accelerated = [(number, pod["spec"]) for number, pod in pods(document) if "nodeSelector" in pod["spec"]]
    shapes = []
    for number, pod in accelerated:
        selector, (container,) = pod["nodeSelector"], pod["containers"]
        assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
        assert selector["cloud.google.com/gke-spot"] == "true"
        assert pod["tolerations"] == [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        shapes.append((selector["cloud.google.com/gke-tpu-topology"], number * container["resources"]["limits"]["google.com/tpu"]))
    assert shapes == [("4x8", 32), ("4x4", 3 * 16)][: len(shapes)] and len(shapes) == (1 if what == "jobset" else 2)


def test_the_queue_admits_the_run():
    """Every resource that a pod asks for is covered, with quota for all of them."""
    quotas = {}
    queue = documents("kueue", "--num-actors=3")[2]
    for part in queue["spec"]["resourceGroups"]:
        quotas |= {resource["name"]: resource["nominalQuota"] for flavor in part["flavors"] for resource in flavor["resources"]}
        assert all({r["name"] for r in flavor["resources"]} == set(part["coveredResources"]) for flavor in part["flavors"])
    for what in ("rayjob", "jobset"):
        (document,) = documents(what, "--num-actors=3")
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == documents("kueue")[3]["metadata"]["name"]
        asked = [(number, c["resources"]["requests"]) for number, pod in pods(document) for c in pod["spec"]["containers"]]
        assert {name for _, requests in asked for name in requests} <= set(quotas)
        assert sum(number * requests.get("google.com/tpu", 0) for number, requests in asked) <= quotas["google.com/tpu"]


def test_a_saved_or_preempted_jobset_restarts_without_end():
    (document,) = documents("jobset")
    (job,) = document["spec"]["replicatedJobs"]
    saved, disrupted = job["template"]["spec"]["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert saved["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [EXIT_PREEMPTED]}
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # a pod failure policy asks for it
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])


def test_ray_authenticates_by_token_and_is_the_installed_version():
    for what in ("rayjob", "raycluster"):
        (document,) = documents(what)
        spec = document["spec"].get("rayClusterSpec", document["spec"])
        assert spec["authOptions"] == {"mode": "token"} and spec["rayVersion"] == ray.__version__
    assert f"ARG RAY_VERSION={ray.__version__}\n" in (ROOT / "launch" / "gke" / "Dockerfile").read_text()


def through_ray_job_submit(entrypoint):
    """The arguments of the program after KubeRay's shell, `ray job submit`, and the shell of the head."""
    first = subprocess.run(f"{PRINT_ARGUMENTS} {entrypoint}", shell=True, capture_output=True, text=True, check=True)
    line = subprocess.list2cmdline(json.loads(first.stdout))  # what ray job submit makes of them
    second = subprocess.run(f"{PRINT_ARGUMENTS} {line}", shell=True, capture_output=True, text=True, check=True)
    return json.loads(second.stdout)


def test_a_rayjob_runs_the_command_as_it_was_given():
    flags = ["--config.task.data_dir=/my data/ml-100k", "--config.num_actors=2", "--config.generation.prompt_buckets=(64, 128)"]
    (document,) = documents("rayjob", "--", *flags[:2])
    arguments = through_ray_job_submit(document["spec"]["entrypoint"])
    assert arguments[:6] == ["bash", "/app/launch/relaunch.sh", "--retries=5", "--wait=30", "python", "/app/launch/train.py"]
    assert arguments[6:8] == ["--config=/app/configs/movielens.py", "--workdir=gs://bucket/a run"] and arguments[-2:] == flags[:2]
    with pytest.raises(ValueError, match="holds a character that `ray job submit` does not pass on"):
        documents("rayjob", "--", flags[2])


def test_a_jobset_runs_the_command_as_it_was_given():
    flags = ["--config.task.data_dir=/my \"data\"/it's $HOME \\ ü: #", "--config.generation.prompt_buckets=(64, 128)"]
    (document,) = documents("jobset", "--", *flags)
    command = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:4] == ["python", "/app/launch/train.py", "--config=/app/configs/movielens.py", "--workdir=gs://bucket/a run"]
    assert command[-2:] == flags


def test_node_pools_are_spot_and_of_the_shape_of_their_slices():
    options = ("--name=run-1", "--cluster=c", "--location=us-west4", "--zone=us-west4-a", "--dry-run")
    code, output, errors = submitted("node-pools", *options, "--topology=4x4", "--actor-topology=2x2", "--num-actors=3", "--project=mine")
    learner, actors = map(shlex.split, output.splitlines())
    assert (code, errors) == (0, "")
    assert learner[:5] == ["gcloud", "container", "node-pools", "create", "run-1-learner"] and actors[4] == "run-1-actors"
    assert {"--machine-type=ct5lp-hightpu-4t", "--tpu-topology=4x4", "--spot", "--max-nodes=4", "--num-nodes=0"} <= set(learner)
    assert {"--machine-type=ct5lp-hightpu-4t", "--spot", "--max-nodes=3", "--project=mine"} <= set(actors)
    assert not any("topology" in argument for argument in actors)
    _, output, _ = submitted("node-pools", *options, "--generation=v5p", "--topology=4x4x4", "--actor-topology=2x2x2", "--num-actors=2")
    names = [shlex.split(line)[4] for line in output.splitlines()]
    assert names == ["run-1-learner", "run-1-actor-0", "run-1-actor-1"]  # each slice of several hosts is a pool


def test_the_dry_run_prints_a_manifest_and_the_command():
    code, output, errors = submitted("jobset", *RUN, "--dry-run")
    assert (code, errors) == (0, "") and output.startswith("# kubectl apply --filename -\n")
    check(yaml.safe_load(output))


def test_hands_the_manifest_to_kubectl_and_reports_its_status(monkeypatch, tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\ncat >{tmp_path}/manifest\nexit 3\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert submitted("rayjob", *RUN)[0] == 3
    assert (tmp_path / "arguments").read_text() == "apply --filename -\n"
    check(yaml.safe_load((tmp_path / "manifest").read_text()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("jobset", "--name=run-1"), "jobset needs --image, --config, --workdir"),
        (("node-pools", "--name=run-1"), "node-pools needs --cluster, --location, --zone"),
        (("jobset", *RUN, "--workdir=runs/here"), "--workdir=runs/here is not in a bucket"),
        (("jobset", *RUN, "--name=Run_1"), "--name=Run_1 is no name"),
        (("jobset", *RUN, f"--name={'a' * 31}"), "at most 30"),
        (("jobset", *RUN, "--num-actors=-1"), "--num-actors=-1 is below 0"),
        (("jobset", *RUN, "--", "--workdir=gs://b/r"), "--workdir=gs://b/r is not --config.key=value"),
        (("jobset", *RUN, "--topology=4x4x4"), "topology '4x4x4' has not the 2 dimensions of a v5e: write, for example, 4x4"),
        (("jobset", *RUN, "--topology=0x4"), "topology '0x4' has not"),
        (("jobset", *RUN, "--topology=1x2"), "topology 1x2 has 2 chips, not a multiple of the 4 of one host"),
    ],
)
def test_refuses_what_could_not_run(arguments, message):
    code, output, errors = submitted(*arguments)
    assert code in (1, 2) and output == "" and message in errors
