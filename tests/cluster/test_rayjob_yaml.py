"""deploy/rayjob.yaml has KubeRay's fields and valid raydet commands, and holds no secrets."""

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raydet.common.errors import UserError
from raydet.common.version import __version__
from tests.command_lines import config_of

PROJECT = Path(__file__).parents[2]
SPEC = PROJECT / "deploy" / "rayjob.yaml"
DOCKERFILE = PROJECT / "deploy" / "Dockerfile"
IN_IMAGE = "/opt/raydet/"

SECRET = re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|hf_[A-Za-z0-9]{20,}|-----BEGIN")
SECRET_NAME = re.compile(r"secret|(^|_)token(_|$)|password|access_key", re.I)


@pytest.fixture
def spec() -> dict[str, Any]:
    content = yaml.safe_load(SPEC.read_text())
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    content = json.loads(Path(__file__).with_name("rayjob_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(content)
    assert isinstance(content, dict)
    return content


def groups_of(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = spec["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def find_faults(spec: dict[str, Any]) -> list[str]:
    """List faults that KubeRay accepts although the job would not work, or not safely."""
    faults = []
    job, cluster = spec["spec"], spec["spec"]["rayClusterSpec"]
    if cluster.get("authOptions", {}).get("mode") != "token":
        faults.append("no token is asked for")
    if not (job.get("shutdownAfterJobFinishes") and job.get("ttlSecondsAfterFinished", 0) > 0):
        faults.append("the cluster outlives the job")
    if not cluster.get("enableInTreeAutoscaling"):
        faults.append("nothing grows")
    groups = groups_of(spec)
    if groups["head"]["rayStartParams"].get("num-cpus") != "0":
        faults.append("the head offers CPUs")
    if len({container_of(group)["image"] for group in groups.values()}) != 1:
        faults.append("nodes have different images")
    for name, group in groups.items():
        resources = container_of(group)["resources"]
        if resources["requests"] != resources["limits"]:
            faults.append(f"{name}: requests and limits differ")
        if "maxReplicas" in group and not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            faults.append(f"{name}: replicas do not fit")
        for variable in container_of(group).get("env", []):
            if SECRET_NAME.search(variable["name"]) and "value" in variable:
                faults.append(f"{name}: {variable['name']} is written out")
    env_vars = yaml.safe_load(job.get("runtimeEnvYAML", "")).get("env_vars", {})
    if any(SECRET_NAME.search(name) for name in env_vars):
        faults.append("a secret in runtimeEnvYAML, which everyone may read")
    return faults


def test_its_fields_are_those_of_kuberay(spec: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.validate(spec, schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["apiVersion"], "ray.io/v1alpha1"),
        (["spec", "runtimeEnv"], "e30="),
        (["spec", "submissionMode"], "JobMode"),
        (["spec", "backoffLimit"], "3"),
        (["spec", "rayClusterSpec", "authOptions"], {"mode": "password"}),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"], {"num-cpus": 0}),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplica"], 3),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "limits"], {}),
    ],
)
def test_the_schema_notices_what_kuberay_would_refuse_or_drop(
    spec: dict[str, Any], schema: dict[str, Any], path: list[Any], value: object
) -> None:
    place: Any = spec
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, schema)


def test_our_own_checks_find_nothing(spec: dict[str, Any]) -> None:
    assert find_faults(spec) == []
    assert not SECRET.search(SPEC.read_text())


def test_our_own_checks_find_what_is_wrong(spec: dict[str, Any]) -> None:
    broken = copy.deepcopy(spec)
    broken["spec"]["rayClusterSpec"].pop("authOptions")
    broken["spec"]["shutdownAfterJobFinishes"] = False
    broken["spec"]["runtimeEnvYAML"] = "env_vars: {HF_TOKEN: x}"
    head, decode = groups_of(broken)["head"], groups_of(broken)["decode"]
    head["rayStartParams"] = {}
    decode["maxReplicas"] = -1
    container_of(decode)["resources"]["limits"] = {"cpu": "1"}
    container_of(decode)["env"] = [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]
    assert find_faults(broken) == [
        "no token is asked for",
        "the cluster outlives the job",
        "the head offers CPUs",
        "decode: requests and limits differ",
        "decode: replicas do not fit",
        "decode: AWS_SECRET_ACCESS_KEY is written out",
        "a secret in runtimeEnvYAML, which everyone may read",
    ]


def test_one_group_decodes_and_one_has_gpus(spec: dict[str, Any]) -> None:
    gpus = {
        name: container_of(group)["resources"]["limits"].get("nvidia.com/gpu")
        for name, group in groups_of(spec).items()
    }
    assert gpus == {"head": None, "decode": None, "model": "1"}
    assert all(groups_of(spec)[name]["maxReplicas"] > 0 for name in ("decode", "model"))


def parse_entrypoint(entrypoint: str) -> Any:
    """Build the config from an entrypoint's options, with the image's files taken from the project."""
    python, script, *options = [
        str(PROJECT / word.removeprefix(IN_IMAGE)) if word.startswith(IN_IMAGE) else word
        for word in shlex.split(entrypoint)
    ]
    assert python == "python" and Path(script).is_file(), script
    return config_of([Path(script).stem, *options])


def test_the_entrypoint_is_a_job_with_options_that_there_are(spec: dict[str, Any]) -> None:
    config = parse_entrypoint(spec["spec"]["entrypoint"])
    assert (config.min_workers, config.max_workers, config.use_gpu) == (1, 4, True)
    assert config.max_workers == groups_of(spec)["model"]["maxReplicas"]
    # Nodes share no disk.
    assert all(uri.startswith("s3://") for uri in (config.train_data, config.val_data, config.out))
    # A killed cluster loses everything since the last saved state.
    assert config.save_every_steps
    with pytest.raises(UserError, match="unknown option --epoch;"):
        parse_entrypoint(f"{spec['spec']['entrypoint']} --epoch 3")


def test_the_image_has_what_the_job_needs(spec: dict[str, Any]) -> None:
    lines = DOCKERFILE.read_text()
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-slim", lines, re.M)
    assert python in ("3.11", "3.12")
    assert "--require-hashes -r requirements.lock" in lines and "--no-deps" in lines
    assert f"WORKDIR {IN_IMAGE.rstrip('/')}\n" in lines
    for name in re.findall(r"^COPY (.*) \S+$", lines, re.M):
        assert all((PROJECT / word).exists() for word in name.split()), name
    assert f":{__version__}" in container_of(groups_of(spec)["head"])["image"]
    assert f"raydet:{__version__}" in lines
    # A user other than root cannot change the installation.
    assert lines.rstrip().endswith("USER 1000")


def test_the_version_of_ray_is_the_locked_one(spec: dict[str, Any]) -> None:
    locked = re.search(r"^ray==(\S+)", (PROJECT / "requirements.lock").read_text(), re.M)
    assert locked is not None
    assert spec["spec"]["rayClusterSpec"]["rayVersion"] == locked[1]
