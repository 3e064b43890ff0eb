"""The record of a job: ids, nodes and versions. It holds no environment and no options, hence no secrets."""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from raydet.common.redaction import without_secrets
from raydet.tables import storage

if TYPE_CHECKING:
    from raydet.cluster.shares import Resources

JOB_FILE = ".job.json"
"""Name of the file about a job in the output folder or the log folder of a run."""
_COMMIT_KEYS = ("commit", "git_commit")
_COMMIT = re.compile(r"[0-9a-fA-F]{7,64}(-dirty)?")
_ACCELERATOR = "accelerator_type:"
_PACKAGES = ("raydet", "ray", "torch", "transformers", "openvino", "onnxruntime", "pyarrow", "numpy", "pillow")


@dataclass(frozen=True)
class NodeKind:
    """A group of identical nodes.

    Attributes:
        accelerator: Ray's name of the GPU type; None without one.
        memory_gb: Memory per node that Ray schedules, in units of 2³⁰ bytes.
    """

    count: int
    num_cpus: float
    num_gpus: float
    accelerator: str | None
    memory_gb: int


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job and the cluster that it started on.

    Attributes:
        submission_id: Id from `ray job submit`; None for a job that was not submitted.
        commit: `commit` from `--metadata-json`; None without one.
        started: Start time, ISO 8601.
        num_workers: Copies of the model; the maximum number if it may change.
        use_gpu: True if each worker has a GPU.
        num_nodes: Number of live nodes at the start, or later if more have joined (see `with_joined_nodes`).
        nodes: Groups of identical nodes, the most frequent first.
        versions: Versions of Python and of the installed packages that affect the result.
    """

    ray_job_id: str
    submission_id: str | None
    commit: str | None
    started: str
    num_workers: int
    use_gpu: bool
    num_nodes: int
    nodes: list[NodeKind]
    versions: dict[str, str]

    @classmethod
    def of_this_job(cls, *, num_workers: int, resources: "Resources") -> Self:
        """Build the record of the job that this process drives, and of the cluster's current nodes."""
        # Imported late: `plan` reads records without Ray.
        import ray

        from raydet.cluster.ray_internals import alive_nodes, submitted_metadata

        nodes = alive_nodes()
        metadata = submitted_metadata()
        commit = next((metadata[key] for key in _COMMIT_KEYS if key in metadata), "")
        return cls(
            ray_job_id=ray.get_runtime_context().get_job_id(),
            submission_id=metadata.get("job_submission_id"),
            commit=commit if _COMMIT.fullmatch(commit) else None,
            started=datetime.datetime.now().astimezone().isoformat(timespec="microseconds"),
            num_workers=num_workers,
            use_gpu=resources.use_gpu,
            num_nodes=len(nodes),
            nodes=_kinds(nodes),
            versions=versions(),
        )

    def with_joined_nodes(self) -> Self:
        """Return the record with the cluster's current nodes if there are now more of them."""
        from raydet.cluster.ray_internals import alive_nodes

        nodes = alive_nodes()
        return self if len(nodes) <= self.num_nodes else replace(self, num_nodes=len(nodes), nodes=_kinds(nodes))

    def write(self, folder: str) -> None:
        """Write the record to `.job.json` in a run's log folder, keeping the records of earlier jobs of the run.

        A second record of the same job replaces the first.
        """
        uri = storage.join(folder, JOB_FILE)
        earlier: list[Any] = []
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            content = json.loads(storage.read_bytes(uri))
            earlier = [
                job
                for job in [*content["earlier_jobs"], content["job"]]
                if (job["ray_job_id"], job["started"]) != (self.ray_job_id, self.started)
            ]
        content = {"job": asdict(self), "earlier_jobs": earlier}
        storage.write_bytes(uri, json.dumps(without_secrets(content), indent=1).encode())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect the result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _kinds(nodes: Sequence[Mapping[str, Any]]) -> list[NodeKind]:
    kinds = Counter(_kind(node["Resources"]) for node in nodes).most_common()
    return [NodeKind(count, *kind) for kind, count in kinds]


def _kind(resources: dict[str, float]) -> tuple[float, float, str | None, int]:
    accelerators = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    memory_gb = round(resources.get("memory", 0.0) / 2**30)
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0), next(iter(accelerators), None), memory_gb
