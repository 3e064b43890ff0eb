"""A check that all nodes of the cluster see the same files: every node must be able to read what another writes."""

import contextlib
import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydet.cluster.ray_internals import alive_nodes
from raydet.common.errors import RunError, UserError, one_line
from raydet.tables import storage

ANSWER_WITHIN_S = 180.0
"""A node may have to fetch the job's working directory first, and ask an object store again and again."""
_BYTES_COMPARED = 2**16
_MOST_NODES_NAMED = 4


@dataclass(frozen=True)
class _Place:
    """Something that every node must see.

    Attributes:
        option: As the user knows it, such as `--out`.
        named: What the user gave for it, for the message.
        uri: The file or folder to look at.
        mark: Of this node's own look at it; see `_mark`.
    """

    option: str
    named: str
    uri: str
    mark: str | None


@dataclass(frozen=True)
class _Finding:
    """Why a node cannot take part: the place that it does not see, and the reason."""

    place: _Place
    reason: str


def check_shared(*, reads: Mapping[str, tuple[str, str]], writes: tuple[str, str] | None = None) -> None:
    """Makes sure that every node that is alive sees the output folder and the inputs of a job, before it begins.

    This process writes a file of a random name into the output. A task on each node must find it there with its
    content, and write one of its own: a network file system and an object store pass, a node's own disk and missing
    credentials do not. Nothing of it stays. On a single machine there is nothing to check. Nodes that join later are
    not asked.

    Args:
        reads: By option, the input as the user gave it, and the URI of the file or folder to look at, which must be
            there: for a table its manifest.
        writes: The output as the user gave it, and the folder in it where these files may lie for a moment.

    Raises:
        UserError: A node does not see what it must.
        RunError: A node cannot run raydet, or does not answer.
        OSError: A place cannot be read or written from here.
    """
    nodes = alive_nodes()
    if [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]:
        return
    places = [_Place(option, named, uri, _mark(uri)) for option, (named, uri) in reads.items()]
    if writes is None:
        findings = _ask(nodes, places, None)
    else:
        with _probe(*writes, nodes) as probe:
            findings = _ask(nodes, [probe, *places], probe)
    if findings:
        raise _refusal(findings)


@contextlib.contextmanager
def _probe(named: str, folder: str, nodes: Sequence[Mapping[str, Any]]) -> Iterator[_Place]:
    """A file in the output, for the time of a `with`; the nodes' answers stand beside it."""
    uri = storage.join(folder, f"_shared-{uuid.uuid4().hex}")
    try:
        storage.write_bytes(uri, uri.encode())
        yield _Place("--out", named, uri, _mark(uri))
    finally:
        # A node that has died in the middle has not removed its own.
        for each in (uri, *(_answer_uri(uri, node["NodeID"]) for node in nodes)):
            with contextlib.suppress(OSError):
                storage.delete_file(each)


def _answer_uri(probe_uri: str, node_id: str) -> str:
    path, mark, options = probe_uri.partition("?") if "://" in probe_uri else (probe_uri, "", "")
    return f"{path}-{node_id}{mark}{options}"


def _ask(
    nodes: Sequence[Mapping[str, Any]], places: Sequence[_Place], probe: _Place | None
) -> list[tuple[str, _Finding]]:
    """Findings of the nodes, with their names; a node that has died meanwhile has none."""
    task = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            places, probe, node["NodeID"]
        )
        for node in nodes
    ]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_WITHIN_S, fetch_local=False)
    alive = {node["NodeID"] for node in alive_nodes()}
    findings = []
    for node, answer in zip(nodes, asked, strict=True):
        name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        if node["NodeID"] not in alive:
            continue
        if answer not in ready:
            raise RunError(f"the node {name} has not answered within {ANSWER_WITHIN_S:.0f} s; see its log, or end it")
        try:
            finding = ray.get(answer)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RunError(
                f"the node {name} cannot run raydet: {reason}; install the same packages on all nodes, or send them "
                "with --runtime-env-json"
            ) from error
        if finding is not None:
            findings.append((name, finding))
    return findings


def _look(places: Sequence[_Place], probe: _Place | None, node_id: str) -> _Finding | None:
    """On a node: the first of the places that is not here what it is on the node that asks."""
    for place in places:
        try:
            here = _mark(place.uri)
        except (OSError, ValueError) as error:
            return _Finding(place, f"cannot read it ({_first_line(error)})")
        if here is None and place.mark is not None:
            return _Finding(place, "does not see what is there on this one")
        if here != place.mark:
            return _Finding(place, "has something else there")
    if probe is not None:
        uri = _answer_uri(probe.uri, node_id)
        try:
            storage.write_bytes(uri, b"")
            storage.delete_file(uri)
        except (OSError, ValueError) as error:
            return _Finding(probe, f"cannot write there ({_first_line(error)})")
    return None


def _mark(uri: str) -> str | None:
    """Size and hash of a file, "folder" for a folder, None for nothing; another file at the same place has another."""
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        return None
    if info.type != pafs.FileType.File:
        return "folder"
    beginning = storage.read_range(uri, 0, min(info.size, _BYTES_COMPARED))
    return f"{info.size} {hashlib.sha256(beginning).hexdigest()}"


def _refusal(findings: Sequence[tuple[str, _Finding]]) -> UserError:
    """One line for all nodes that the first finding is true of."""
    first = findings[0][1]
    place, is_file_tree = first.place, "://" not in first.place.uri or first.place.uri.startswith("file://")
    names = [name for name, finding in findings if finding.place == place]
    shown = ", ".join(names[:_MOST_NODES_NAMED])
    more = f" and {len(names) - _MOST_NODES_NAMED} more" if len(names) > _MOST_NODES_NAMED else ""
    advice = (
        "on several machines use what all of them see at the same place: s3://, gs://, or a network file system"
        if is_file_tree
        else "every node needs the credentials and the endpoint that this one has: a role of the machines, or env_vars "
        "in --runtime-env-json"
    )
    return UserError(
        f"not all nodes share {place.option} {place.named}: the node{'s' if len(names) > 1 else ''} {shown}{more} "
        f"{first.reason}; {advice}"
    )


def _first_line(error: BaseException) -> str:
    return one_line(getattr(error, "strerror", None) or error, limit=300)
