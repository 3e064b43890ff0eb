"""Batch inference: images and a checkpoint → a detections table with exactly one row per image, despite failures.

This is the driver: it checks the inputs, divides the images into chunks, has the remaining chunks scored, and counts
the results. `stream.py` scores on a Ray cluster, `local.py` in this process.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raydet.cluster.job_record import JOB_FILE, JobRecord
from raydet.cluster.job_report import JobReport, JobStats
from raydet.common.console import MOST_NAMED, Console, counted
from raydet.common.errors import UserError
from raydet.common.notebook.showing import Shown
from raydet.common.ray_address import announce, is_connected
from raydet.common.redaction import without_secrets
from raydet.config import PredictConfig, config_hash, identity
from raydet.config.fields import with_options
from raydet.engines.engine import check_engine, no_fp16_on_cpu
from raydet.engines.loading import EngineLoader, load_engine
from raydet.engines.selection import check_classes
from raydet.images.collection import Collection, IndexedCollection, VideoCollection, index_in, open_collection
from raydet.images.windows.index import WindowSize
from raydet.measuring.fitting.operating_point import read_point_of
from raydet.models.checkpoints import fingerprint, read_checkpoint
from raydet.models.families import family_of
from raydet.scoring.chunks import unreadable_in
from raydet.scoring.following import ScoringProgress
from raydet.scoring.gallery import GalleryPainter
from raydet.scoring.kept import vectors_to_keep
from raydet.scoring.models import ModelFacts, check_adapters, check_fit, schema_of
from raydet.scoring.pictures import Picture, detect_in, pictures_in
from raydet.scoring.plan import ChunkStats, FileCounts, ScoringPlan, Work, files_of_chunks, part_name, table_uri
from raydet.scoring.recovery import ScoringPlace, raise_if_permanent, reason_of, score_all
from raydet.scoring.windows.merging import WINDOWS_FOLDER, PictureWriter, plan_of_pictures, work_of_windows
from raydet.tables import storage
from raydet.tables.output_folder import OutputFolder, RunRecord, open_folder, token_of_run
from raydet.tables.schema import Category, token_of, with_token
from raydet.tables.table import is_table, open_table, read_manifest, write_manifest

MOST_IMAGES_IN_PROCESS = 2_000
"""For no more images than this, starting Ray takes longer than it saves."""


@dataclass(frozen=True)
class AdapterResult:
    """Result of one adapter of a scoring run.

    Attributes:
        out: Folder or URI of its detections table.
        adapter: Folder of the adapter.
        num_detections: Detections in all rows.
    """

    out: str
    adapter: str
    num_detections: int


@dataclass(frozen=True)
class PredictResult(Shown):
    """Result of a scoring run.

    Attributes:
        out: Folder or URI of the detections table, or of those of all adapters; for pictures, the file or folder of the
            drawings.
        num_images: Rows of each table, one per image.
        num_errors: Rows whose image could not be read.
        num_detections: Detections in all rows of all tables.
        unreadable: Reason by path of each unreadable image, if there are at most `MOST_NAMED`.
        already_done: True if the run was finished before this call.
        report: Lines of the job report for the terminal.
        pictures: With pictures as `data`, each that is readable, with its detections; there is no table then.
        adapters: With adapters, the result of each by its name; there is no table in `out` itself then.
    """

    out: str
    num_images: int
    num_errors: int
    num_detections: int
    unreadable: Mapping[str, str] = field(default_factory=dict)
    already_done: bool = False
    report: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    adapters: Mapping[str, AdapterResult] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return a summary of the run for the terminal."""
        unreadable = [f"  unreadable, {path}: {reason}" for path, reason in self.unreadable.items()]
        if self.pictures:
            return [*(line for picture in self.pictures for line in picture.lines()), *unreadable]
        first = ["nothing to do: this run is finished"] if self.already_done else []
        errors = f" ({self.num_errors:,} unreadable)" if self.num_errors else ""
        by = f" by {counted(len(self.adapters), 'adapter')}" if self.adapters else ""
        tables = [
            f"detections of {name}: {each.out} ({counted(each.num_detections, 'detection')})"
            for name, each in self.adapters.items()
        ]
        return [
            *self.report,
            *first,
            f"{counted(self.num_images, 'image')}{errors}; {counted(self.num_detections, 'detection')}{by}",
            *unreadable,
            *(tables or [f"detections: {self.out}"]),
        ]


@with_options(PredictConfig)
def predict(config: PredictConfig, *, console: Console | None = None) -> PredictResult:
    """Score every image of a collection; an interrupted run resumes. Or draw boxes on the pictures that `data` names.

    Raises:
        UserError: The collection, the model or the output folder is invalid. Nothing has been written.
        RunError: The run failed. The files written so far are complete; the same command resumes the run.
    """
    console = console or Console()
    names = None if config.windowed else pictures_in(config.data)
    if names is None:
        return predict_with(config, console=console)
    found = detect_in(names, config, console=console)
    return PredictResult(
        found.out,
        num_images=len(names),
        num_errors=len(found.unreadable),
        num_detections=sum(len(picture.scores) for picture in found.pictures),
        unreadable=found.unreadable,
        pictures=found.pictures,
    )


def predict_with(
    config: PredictConfig,
    *,
    console: Console | None = None,
    in_process: bool | None = None,
    load: EngineLoader = load_engine,
) -> PredictResult:
    """Score as `predict` does, in this process or on a Ray cluster, with another function to load the engine.

    By default, small collections are scored in this process unless a cluster is available. `load` must be picklable.
    """
    console = console or Console()
    if not config.out:
        raise UserError("missing --out, the folder for the detections table; see raydet predict --help")
    model = _check_model(config)
    # Absolute, because workers have other working directories and the run's identity must not depend on this one.
    config = dataclasses.replace(
        config,
        out=storage.absolute_uri(config.out),
        data=storage.absolute_uri(config.data if isinstance(config.data, str) else config.data[0]),
        score_threshold=config.score_threshold or 0.0,
        checkpoint=model.name if config.checkpoint else None,
        adapter=[adapter.uri for adapter in model.adapters] or None,
        model=model.name if config.model else None,
        examples=storage.absolute_uri(config.examples) if config.examples else None,
        keep=sorted(set(config.keep)) if config.keep else None,
    )
    with open_folder(config.out, command="predict", notify=console.line) as folder:
        if not folder.refuse_foreign():  # left by a run that stopped before it began; files may have been added since
            storage.delete_file(index_in(folder.uri))
        is_finished = all(is_table(table_uri(folder, table)) for table in model.by_table)
        if not is_finished:
            check_fit(model, console)  # before files are listed, which may be many
        found = open_collection(
            config.data_uri,
            index_uri=index_in(folder.uri),
            allow_root=config.allow_root,
            fps=config.fps,
            windows=WindowSize(config.tile or 0, config.max_pixels) if config.windowed else None,
        )
        if isinstance(found, IndexedCollection) and found.num_skipped:
            console.line(f"{found.num_skipped:,} files skipped: their endings are not those of images")
        if isinstance(found, VideoCollection) and found.num_missing:
            console.line(f"truncated video: {counted(found.num_missing, 'frame')} that its header states are missing")
        images = found.first(config.limit)
        fingerprints = {"checkpoint_fingerprint": model.fingerprint, "data_fingerprint": images.fingerprint}
        if model.point is not None:
            fingerprints["operating_point_fingerprint"] = model.point.fingerprint
        if model.examples is not None:
            fingerprints["examples_fingerprint"] = model.examples
        run_identity: dict[str, Any] = {**identity(config), **fingerprints}
        if model.adapters:
            run_identity["adapter_fingerprints"] = {each.name: each.fingerprint for each in model.adapters}
        folders = (WINDOWS_FOLDER,) if config.windowed else tuple(model.adapted)
        earlier = folder.admit(run_identity, folders=folders)
        if is_finished:
            _delete_windows(config, folder)
            return _result(folder, model, _draw(config, model, images), already_done=True)
        started = time.perf_counter()
        token = token_of_run(run_identity)
        work = Work(
            config=config,
            folder=folder,
            model_fingerprint=model.fingerprint,
            images=images,
            plan=plan_of_pictures(images.num_rows) if config.windowed else ScoringPlan.of(config, images.num_rows, 1),
            schemas={
                table: with_token(schema_of(each, images, config, base=model if model.adapters else None), token)
                for table, each in model.by_table.items()
            },
            load_engine=load,
            point=model.point,
            adapters=model.adapters,
        )
        scored = work_of_windows(work) if config.windowed else work
        if in_process is None:
            in_process = _suits_this_process(config, scored.images)
        with _place(config, console, in_process) as place:
            scored = dataclasses.replace(scored, plan=_plan(scored, earlier, place))
            if earlier is None:
                folder.begin(run_identity, plan=dataclasses.asdict(scored.plan), folders=folders)
            if config.windowed:
                pictures, windows = counted(images.num_rows, "picture"), counted(scored.images.num_rows, "window")
                console.line(f"{pictures} in {windows}; progress and report count windows")
            report, written = _run(config, scored, place, console, started)
            if config.windowed:
                written = _merge(work, scored, place, console)
            else:
                work = scored
        _finish(work, written)
        _delete_windows(config, folder)
        return _result(folder, model, [*report.lines(), *_draw(config, model, images)])


def _merge(work: Work, windows: Work, place: ScoringPlace, console: Console) -> dict[str, tuple[FileCounts, ...]]:
    """Write the rows of pictures from those of their windows."""
    writer = PictureWriter(work, windows)
    with console.progress("merging windows", total=work.plan.num_rows, unit="pictures") as progress:
        return score_all(
            work, place, note=lambda file: progress.advance(file.num_images), notify=console.line, write=writer
        )


def _delete_windows(config: PredictConfig, folder: OutputFolder) -> None:
    """Remove the detections of windows, which are part of the table now."""
    if config.windowed:
        storage.delete_folder(folder.uri_of(WINDOWS_FOLDER))


def _suits_this_process(config: PredictConfig, images: Collection) -> bool:
    """Return True for a small collection on one machine, unless the caller has a cluster or reserves CPUs of one."""
    is_small = images.num_rows <= MOST_IMAGES_IN_PROCESS and config.num_workers == 1 and config.cpus_per_worker is None
    return is_small and not os.environ.get("RAY_ADDRESS") and not is_connected()


@contextlib.contextmanager
def _place(config: PredictConfig, console: Console, in_process: bool) -> Iterator[ScoringPlace]:
    """Context manager: the place of a run, which does not import Ray if that is this process."""
    if in_process:
        from raydet.scoring import local

        with local.this_process(config, console) as here:
            yield here
    else:
        announce(console.line)  # before Ray is imported, which takes a second
        from raydet.scoring import distributed

        with distributed.connected(config, console) as cluster:
            yield cluster


def _check_model(config: PredictConfig) -> ModelFacts:
    if config.model is not None:
        from raydet.engines.zero_shot import check_prompts
        from raydet.engines.zero_shot_models.prompts import fingerprint_of

        prompts = check_prompts(config)
        if config.precision == "fp16" and config.use_gpu is False:
            raise no_fp16_on_cpu(config.engine)
        name = storage.absolute_uri(config.model) if storage.exists(config.model) else config.model
        categories = tuple(Category(id=index, name=prompt.label) for index, prompt in enumerate(prompts))
        model = ModelFacts(name, categories, fingerprint(config.model), examples=fingerprint_of(prompts))
    else:
        assert config.checkpoint is not None, "the config asks for a checkpoint or a model"
        checkpoint = read_checkpoint(config.checkpoint, takes_graph=config.engine == "openvino")
        family = family_of(checkpoint.model_type, where=config.checkpoint)
        check_engine(config, checkpoint.model_type)
        if config.adapters:
            model = check_adapters(config, checkpoint)
        elif not checkpoint.categories:
            raise UserError(f"the model {checkpoint.name} defines no classes: its config.json has no id2label")
        else:
            point, kept = read_point_of(config, checkpoint.categories), vectors_to_keep(config, checkpoint, family)
            model = ModelFacts(checkpoint.name, checkpoint.categories, fingerprint(config.checkpoint), point, kept)
    if config.reduced_decode and (config.tile or config.model):
        tiles = "--tile: tiles are cut from the full-size image"
        other = tiles if config.tile else "a zero-shot model: it requires a trained detector"
        raise UserError(f"--reduced-decode cannot be combined with {other}")
    if not model.adapters:
        check_classes(config.classes, model.categories)
    return model


def _run(
    config: PredictConfig, work: Work, place: ScoringPlace, console: Console, started: float
) -> tuple[JobReport, dict[str, tuple[FileCounts, ...]]]:
    """Score what is left; write OUT/.job.json in any case."""
    stats, reason, job = JobStats(), None, place.job_record()
    found = files_of_chunks(work.folder, work.schemas)
    num_rows = sum(len(work.plan.rows_of(chunk)) for chunk in found.values())
    unit = "windows" if config.windowed else "images"
    if num_rows:
        console.line(f"resuming at {num_rows:,} of {work.plan.num_rows:,} {unit}")
    try:
        total = work.plan.num_rows
        with console.progress("scoring", total=total, unit=unit, completed=num_rows, leaves_line=False) as progress:
            shown = ScoringProgress(progress, num_workers=work.config.num_workers)

            def note(chunk: ChunkStats) -> None:
                stats.add(chunk)
                shown.add(chunk)

            written = score_all(work, place, note=note, notify=console.line)
    except BaseException as error:
        reason = reason_of(error)
        raise
    finally:
        if reason is None:
            job = place.with_joined_nodes(job)
        wall_s = time.perf_counter() - started
        report = _write_report(config, work.folder, stats, wall_s=wall_s, job=job, error=reason)
    return report, written


def _write_report(
    config: PredictConfig, folder: OutputFolder, stats: JobStats, *, wall_s: float, job: JobRecord, error: str | None
) -> JobReport:
    """Write OUT/.job.json, even for a failed run; a full disk is reported elsewhere."""
    earlier = None
    with contextlib.suppress(OSError, ValueError, UserError):
        earlier = storage.read_json(folder.uri_of(JOB_FILE))
    report = stats.finish(
        wall_s=wall_s,
        num_model_workers=config.num_workers,
        price_per_node_hour=config.price_per_node_hour,
        config_hash=config_hash(config),
        error=error,
        job=job,
        earlier=earlier,
    )
    with contextlib.suppress(OSError):
        folder.write_bytes(json.dumps(without_secrets(dataclasses.asdict(report)), indent=1).encode(), JOB_FILE)
    return report


def _draw(config: PredictConfig, model: ModelFacts, images: Collection) -> list[str]:
    if not config.draw:
        return []
    lines: list[str] = []
    for table, each in model.by_table.items():
        uri = storage.join(config.out, table) if table else config.out
        gallery = GalleryPainter(
            uri, each.categories, config.draw, config.draw_if, config.draw_threshold, max_pixels=config.max_pixels
        )
        lines += gallery.draw(images, gallery.choose(open_table(uri, "detections"))).lines()
    return lines


def _plan(work: Work, earlier: RunRecord | None, place: ScoringPlace) -> ScoringPlan:
    """Return the plan of the run that this one resumes, or a new one."""
    config, batch_size = work.config, work.config.batch_size
    if earlier is not None:
        plan = ScoringPlan(**earlier.plan)
        # Chunks and blocks stay as planned.
        return dataclasses.replace(plan, batch_size=batch_size) if isinstance(batch_size, int) else plan
    if batch_size == "auto":
        try:
            batch_size = place.best_batch_size(config, work.load_engine)
        except Exception as error:
            raise_if_permanent(error, work, place.losses)
            raise
    return ScoringPlan.of(config, work.images.num_rows, batch_size)


def _finish(work: Work, written: dict[str, tuple[FileCounts, ...]]) -> None:
    """Check that there is one row per image, and write the manifests, which mark tables as complete."""
    names = [part_name(chunk) for chunk in range(work.plan.num_chunks)]
    unreadable: dict[str, str] | None = None
    for number, (table, schema) in enumerate(work.schemas.items()):
        counts = {name: written[name][number] for name in names}
        uri = table_uri(work.folder, table)
        num_rows = sum(file.num_images for file in counts.values())
        assert num_rows == work.plan.num_rows, f"{num_rows} rows for {work.plan.num_rows} images"
        num_errors = sum(file.num_errors for file in counts.values())
        if unreadable is None:  # the same in all tables
            named = [name for name, file in counts.items() if file.num_errors] if num_errors <= MOST_NAMED else []
            unreadable = unreadable_in(uri, named)
        write_manifest(
            uri,
            {name: file.groups for name, file in counts.items()},
            config_hash=config_hash(work.config),
            token=token_of(schema.metadata),
            id_space=work.images.id_space,
            num_errors=num_errors,
            unreadable=unreadable,
            num_detections=sum(file.num_detections for file in counts.values()),
        )


def _result(
    folder: OutputFolder, model: ModelFacts, report: Sequence[str], *, already_done: bool = False
) -> PredictResult:
    manifests = {table: read_manifest(table_uri(folder, table)) for table in model.by_table}
    first = next(iter(manifests.values()))
    adapters = {
        each.name: AdapterResult(folder.uri_of(each.name), each.uri, manifests[each.name]["num_detections"])
        for each in model.adapters
    }
    return PredictResult(
        folder.uri,
        first["num_rows"],
        first["num_errors"],
        sum(manifest["num_detections"] for manifest in manifests.values()),
        unreadable=first.get("unreadable", {}),
        already_done=already_done,
        report=tuple(report),
        adapters=adapters,
    )
