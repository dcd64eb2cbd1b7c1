"""The JobSet that gke_jobset.sh writes: valid against the JobSet and batch/v1 schemas, and what it says."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from launch_tools import AWKWARD, Launcher, heredoc
from referencing import Registry, Resource

SCHEMAS = Path(__file__).parent / "schemas"
BASE = ["--name", "vl", "--image", "i:1"]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    contents = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    specification = jsonschema.Draft202012Validator
    resources = [
        (name, Resource.from_contents({"$schema": specification.META_SCHEMA["$id"], **each}))
        for name, each in contents.items()
    ]
    return specification(contents["jobset_v1alpha2.json"], registry=Registry().with_resources(resources))


def jobset(launcher, *arguments):
    printed = launcher.printed("gke_jobset.sh", *BASE, *arguments, "--", *AWKWARD)
    return yaml.safe_load(heredoc(printed, "END_OF_YAML"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return jobset(
        Launcher(tmp_path_factory.mktemp("plain")), "--accelerator", "v5p-128", "--restarts", "9", "--grace", "77"
    )


def pod_of(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--accelerator", "v5p-128", "--slices", "2", "--spot", "--cache-dir", "gs://b/c d"],
        ["--accelerator", "v6e-8", "--chips-per-host", "8"],
        ["--accelerator", "v5litepod-16", "--namespace", "n", "--service-account", "s"],
        ["--accelerator", "tpu7x-128", "--restarts", "0"],
    ],
)
def test_it_is_valid(launcher, validator, arguments):
    validator.validate(jobset(launcher, *arguments))


@pytest.mark.parametrize(
    "path, value",
    [
        ("spec.failurePolicy.rules.0.action", "GiveUp"),
        ("spec.failurePolicy.rules.0.onJobFailureReasons", ["BadLuck"]),
        ("spec.replicatedJobs.0.replica", 2),
        ("spec.replicatedJobs.0.template.spec.backOffLimit", 0),
        ("spec.replicatedJobs.0.template.spec.parallelism", "4"),
        ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.values", ["1"]),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.command", "stepjax"),
        ("spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriod", 300),
        ("metadata.name", "A_b"),
    ],
)
def test_the_schemas_notice_a_mistake(plain, validator, path, value):
    found = copy.deepcopy(plain)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = found
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(found)


def test_slices_hosts_and_chips(launcher):
    found = jobset(launcher, "--accelerator", "v5p-128", "--slices", "3", "--spot", "--cache-dir", "gs://b/c d")
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    [slices] = found["spec"]["replicatedJobs"]
    job, pod = slices["template"]["spec"], pod_of(found)
    assert slices["replicas"] == 3
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (16, 16, "Indexed")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {each["name"]: each["value"] for each in container["env"]} == {
        "STEPJAX_DISTRIBUTED": "auto",
        "JAX_COMPILATION_CACHE_DIR": "gs://b/c d",
    }


@pytest.mark.parametrize("chips, hosts", [(8, 1), (4, 2)])
def test_eight_chips_are_one_host_or_two(launcher, chips, hosts):
    found = jobset(launcher, "--accelerator", "v6e-8", "--chips-per-host", str(chips))
    assert found["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == hosts
    assert pod_of(found)["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


def test_mistakes_fail_it_and_all_else_starts_it_again(plain):
    policy = plain["spec"]["failurePolicy"]
    [rule] = policy["rules"]
    assert policy["maxRestarts"] == 9
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job, pod = plain["spec"]["replicatedJobs"][0]["template"]["spec"], pod_of(plain)
    [pod_rule] = job["podFailurePolicy"]["rules"]
    assert pod_rule["action"] == "FailJob"
    assert pod_rule["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"],
        "operator": "In",
        "values": [1, 2],
    }
    assert (job["backoffLimit"], pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == (0, "Never", 77)


def test_the_command_survives_kubernetes_expansion(plain):
    words = pod_of(plain)["containers"][0]["command"]
    assert not any("$" in word.replace("$$", "") for word in words)  # nothing is left for Kubernetes to expand
    words = [word.replace("$$", "$") for word in words]  # which is all that it does then
    assert words[:2] == ["bash", "-c"] and words[2].endswith(' && exec "$@"') and words[4:] == AWKWARD
    assert words[2].startswith("flags=$(python -m stepjax.xla_flags v5p) && export LIBTPU_INIT_ARGS=")
