"""What ran where: the job's ids, its nodes, its versions. No environment, no option, nothing that could be a secret."""

import contextlib
import datetime
import json
import os
import re
from collections import Counter
from typing import Any

import ray

from raydet.cluster.job_report import JOB_FILE, versions
from raydet.tables import storage

_JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's job server puts the job's metadata here, for the driver alone."""
_COMMIT_KEYS = ("commit", "git_commit")
_COMMIT = re.compile(r"[0-9a-fA-F]{7,64}(-dirty)?")
_ACCELERATOR = "accelerator_type:"


def job_record() -> dict[str, Any]:
    """What the driver knows of the job that it is, and of the cluster as it is now.

    Returns:
        `ray_job_id`; `submission_id` and `commit`, null where the job was not submitted, or without a `commit` in its
        `--metadata-json`; `started`, ISO 8601; `num_nodes`, and `nodes`, the kinds of them with their `count`,
        `num_cpus`, `num_gpus`, `accelerator` and `memory_gb` (2³⁰ bytes); `versions` of the packages.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    kinds = Counter(_kind(node["Resources"]) for node in nodes)
    metadata = _metadata()
    commit = next((metadata[key] for key in _COMMIT_KEYS if key in metadata), "")
    return {
        "ray_job_id": ray.get_runtime_context().get_job_id(),
        "submission_id": metadata.get("job_submission_id"),
        "commit": commit if _COMMIT.fullmatch(commit) else None,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "num_nodes": len(nodes),
        "nodes": [{"count": count, **dict(kind)} for kind, count in kinds.most_common()],
        "versions": versions(),
    }


def write_job_record(folder: str) -> None:
    """Writes the record to `job.json` in a run's log folder, with those of the jobs that the run goes on from."""
    uri = storage.join(folder, JOB_FILE)
    earlier: list[Any] = []
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        content = json.loads(storage.read_bytes(uri))
        earlier = [*content["earlier_jobs"], content["job"]]
    record = {"job": job_record(), "earlier_jobs": earlier}
    storage.write_bytes(uri, json.dumps(record, indent=1).encode())


def _kind(resources: dict[str, float]) -> tuple[tuple[str, Any], ...]:
    accelerators = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    return (
        ("num_cpus", resources.get("CPU", 0.0)),
        ("num_gpus", resources.get("GPU", 0.0)),
        ("accelerator", accelerators[0] if accelerators else None),
        ("memory_gb", round(resources.get("memory", 0.0) / 2**30)),
    )


def _metadata() -> dict[str, str]:
    """What was given with `ray job submit --metadata-json`, and Ray's own; empty in a process that is no such job."""
    try:
        metadata = json.loads(os.environ.get(_JOB_CONFIG_VARIABLE, "{}")).get("metadata") or {}
    except (ValueError, AttributeError):
        return {}
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
