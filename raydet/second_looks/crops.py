"""The command `crops`: detections and their images → what a second model says about each, one row a detection.

This is the driver. A chunk of images becomes one file; a run that is killed goes on with the chunks that have none.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from raydet.common.console import Console, counted
from raydet.common.errors import RunError, UserError
from raydet.common.notebook.showing import Shown
from raydet.common.ray_address import announce, is_connected
from raydet.common.redaction import without_secrets
from raydet.common.signals import ending_on_sigterm
from raydet.common.untrusted.documents import parse_json
from raydet.config import CropsConfig, config_hash, identity
from raydet.config.fields import with_options
from raydet.images.collection import Collection, index_in, open_collection
from raydet.images.windows.index import PICTURE_FIELDS
from raydet.models.checkpoints import fingerprint, read_checkpoint
from raydet.scoring.plan import COUNTS_KEY, files_of_chunks, part_name
from raydet.second_looks.models.looker import answer_fields, check_task
from raydet.second_looks.relabelling import RELABELLED, labels_of, relabel
from raydet.second_looks.work import CropsWork
from raydet.second_looks.writing import WrittenChunk
from raydet.tables import storage
from raydet.tables.layout import groups_of
from raydet.tables.output_folder import OutputFolder, open_folder, token_of_run
from raydet.tables.schema import build_schema, parse_metadata, token_of, with_token
from raydet.tables.table import Table, is_table, open_table, read_footers, read_manifest, write_manifest

MOST_IMAGES_IN_PROCESS = 2_000
"""For no more images than this, starting Ray takes longer than it saves."""
_IMAGES_PER_FILE = 64


@dataclass(frozen=True, kw_only=True)
class CropsResult(Shown):
    """Result of a crops run.

    Attributes:
        out: Folder or URI of the crops table.
        num_crops: Rows of the table, one per detection.
        num_errors: Rows without an answer, because the image could not be read or the crop is too small.
        already_done: True if the run was finished before this call.
        relabelled: With `--relabel`, folder or URI of the detections table with the classes of the labels.
    """

    out: str
    num_crops: int
    num_errors: int
    already_done: bool = False
    relabelled: str | None = None

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        first = ["nothing to do: this run is finished"] if self.already_done else []
        errors = f" ({self.num_errors:,} without an answer)" if self.num_errors else ""
        lines = [*first, f"{counted(self.num_crops, 'detection')}{errors}", f"crops: {self.out}"]
        return lines + ([f"detections with their labels: {self.relabelled}"] if self.relabelled else [])


class _CropsPlace(Protocol):
    """The place where the model runs."""

    def run(self, work: CropsWork, chunks: Sequence[int]) -> Iterator[WrittenChunk]:
        """Write the files of chunks, in any order."""


@with_options(CropsConfig)
def crops(config: CropsConfig, *, console: Console | None = None) -> CropsResult:
    """Ask a second model about every detection; an interrupted run resumes.

    Raises:
        UserError: The detections, their images, the model or the output folder are invalid. Nothing has been written.
        RunError: The run failed. The files written so far are complete; the same command resumes the run.
    """
    console = console or Console()
    found = open_table(config.detections, "detections")
    if all(field.name in found.schema.names for field in PICTURE_FIELDS):
        raise UserError(
            f"{found.uri} is about pictures that predict --windowed read in parts, but crops decodes whole images; "
            "score those that are small enough with --tile alone"
        )
    model = read_checkpoint(config.model)
    check_task(config, model.content)
    labels = labels_of(config, model) if config.relabel is not None else ()
    model_fingerprint = fingerprint(config.model)
    config = dataclasses.replace(
        config,
        detections=found.uri,
        data=storage.absolute_uri(config.data),
        out=storage.absolute_uri(config.out),
        model=model.name,
    )
    with open_folder(config.out, command="crops", notify=console.line) as folder:
        records, already_done = folder.refuse_foreign([RELABELLED]), is_table(folder.uri)
        # Such as one whose model could not be loaded: the next one may have other settings.
        has_nothing = not already_done and not files_of_chunks(folder)
        if not records or has_nothing:
            storage.delete_file(index_in(folder.uri))
        images = open_collection(
            config.data, index_uri=index_in(folder.uri), allow_root=config.allow_root, fps=config.fps
        )
        images = _those_of(found, images, config.data)
        run_identity = {
            **identity(config),
            "detections_fingerprint": found.fingerprint,
            "data_fingerprint": images.fingerprint,
            "model_fingerprint": model_fingerprint,
        }
        earlier = folder.admit(run_identity, folders=[RELABELLED], is_disposable=has_nothing)
        if earlier is None:
            folder.begin(
                run_identity, folders=[RELABELLED], plan={"images_per_file": config.rows_per_file or _IMAGES_PER_FILE}
            )
            earlier = folder.record()
        assert earlier is not None
        work = CropsWork(
            config=config,
            folder=folder,
            images=images,
            found=found,
            schema=with_token(_schema(found, config, model_fingerprint), token_of_run(run_identity)),
            images_per_file=earlier.plan["images_per_file"],
        )
        if not already_done:
            _finish(work, _write_all(work, console))
        relabelled = relabel(work, labels) if config.relabel is not None else None
        return _result(folder, already_done=already_done, relabelled=relabelled)


def _those_of(found: Table, images: Collection, data: str) -> Collection:
    """Return the images that were scored, the first ones of a collection; raise UserError if they are others."""
    spaces = found.manifest.get("id_space"), images.id_space
    if images.num_rows < found.num_rows or (None not in spaces and spaces[0] != spaces[1]):
        raise UserError(f"{data} does not hold the images of {found.uri}; set --data to what predict scored")
    return images.first(found.num_rows)


def _schema(found: Table, config: CropsConfig, model_fingerprint: str) -> pa.Schema:
    content = parse_metadata(found.schema, kind="detections", where=found.uri)
    metadata = {
        "task": config.task,
        "model": without_secrets(config.model),
        "model_hash": model_fingerprint,
        "ask": config.ask,
        "labels": config.labels,
        "checkpoint_hash": content.get("checkpoint_hash"),
    }
    return build_schema("crops", found.categories, extra_fields=answer_fields(config), extra_metadata=metadata)


def _write_all(work: CropsWork, console: Console) -> dict[str, WrittenChunk]:
    """Write the files of all chunks that have none, and return what is in all of them."""
    written = _written(work)
    left = [chunk for chunk in range(work.num_chunks) if part_name(chunk) not in written]
    total, done = work.found.num_rows, sum(chunk.num_images for chunk in written.values())
    if written and left:
        console.line(f"resuming at {done:,} of {total:,} images")
    with (
        _place(work.config, work.found.num_rows, console) if left else contextlib.nullcontext() as place,
        console.progress("looking", total=total, completed=done) as progress,
    ):
        if place is not None:
            for chunk in place.run(work, left):
                work.folder.check()
                written[chunk.name] = chunk
                progress.advance(chunk.num_images)
    return written


def _written(work: CropsWork) -> dict[str, WrittenChunk]:
    """Return what is in the files that the run has finished; a file of another run is written again."""
    names = [name for name, chunk in files_of_chunks(work.folder).items() if chunk < work.num_chunks]
    found = {}
    for name, footer in zip(names, read_footers(work.folder.uri, names), strict=True):
        chunk = None if footer is None else _chunk_in(name, footer, work)
        if chunk is not None:
            found[name] = chunk
    return found


def _chunk_in(name: str, footer: pq.FileMetaData, work: CropsWork) -> WrittenChunk | None:
    metadata = footer.metadata or {}
    if token_of(metadata) != token_of(work.schema.metadata):
        return None
    try:
        return WrittenChunk(name, groups_of(footer), **parse_json(metadata[COUNTS_KEY]))
    except (KeyError, TypeError, ValueError):
        return None


@contextlib.contextmanager
def _place(config: CropsConfig, num_images: int, console: Console) -> Iterator[_CropsPlace]:
    """Context manager: the place of a run, which does not import Ray if that is this process."""
    is_small = num_images <= MOST_IMAGES_IN_PROCESS and config.num_workers == 1 and config.cpus_per_worker is None
    if is_small and not os.environ.get("RAY_ADDRESS") and not is_connected():
        from raydet.second_looks.in_process import CropsHere

        console.line("few images: looking in this process, without Ray; loading the model")
        with ending_on_sigterm():
            yield CropsHere(config)
        return
    announce(console.line)
    from raydet.second_looks.on_ray import connected

    with connected(config, console) as actors:
        yield actors


def _finish(work: CropsWork, written: dict[str, WrittenChunk]) -> None:
    """Write the manifest, which marks the table as complete."""
    chunks = [written[part_name(chunk)] for chunk in range(work.num_chunks)]
    for chunk in chunks:
        if sum(num_rows for num_rows, _ in chunk.groups) != chunk.num_crops:
            raise RunError(f"{work.folder.uri_of(chunk.name)} is damaged; delete it and run the same command again")
    write_manifest(
        work.folder.uri,
        {chunk.name: chunk.groups for chunk in chunks},
        config_hash=config_hash(work.config),
        token=token_of(work.schema.metadata),
        id_space=work.images.id_space,
        num_errors=sum(chunk.num_errors for chunk in chunks),
    )


def _result(folder: OutputFolder, *, already_done: bool, relabelled: str | None) -> CropsResult:
    manifest = read_manifest(folder.uri)
    return CropsResult(
        out=folder.uri,
        num_crops=manifest["num_rows"],
        num_errors=manifest["num_errors"],
        already_done=already_done,
        relabelled=relabelled,
    )
