"""Batch inference: images and a checkpoint → a detections table with exactly one row per image, despite failures.

This is the driver: it checks the inputs, divides the images into chunks, has the pipeline score the chunks that are
not done yet, and counts the result. `stream.py` holds the code that runs on the cluster.
"""

import contextlib
import dataclasses
import errno
import json
import math
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from raydet.cluster import session, shares
from raydet.cluster.caller import LOG_FILE
from raydet.cluster.job_record import JOB_FILE, JobRecord
from raydet.cluster.job_report import JobReport, JobStats
from raydet.cluster.ray_internals import ExecutionTimeoutError, RpcError, SystemException
from raydet.cluster.shared_storage import check_shared
from raydet.common.console import Console
from raydet.common.errors import RunError, UserError, first_line
from raydet.common.redaction import without_secrets
from raydet.config import PredictConfig, config_hash, identity
from raydet.engines.engine import check_engine, no_fp16_on_cpu
from raydet.engines.selection import check_classes
from raydet.images.collection import Collection, open_collection
from raydet.images.listing import is_pattern
from raydet.models.checkpoints import fingerprint, read_checkpoint
from raydet.models.families import family_of
from raydet.models.geometry import ResizeRule
from raydet.scoring.gallery import GalleryPainter, GalleryReport
from raydet.scoring.stream import COUNTS_KEY, LOG_FOLDER, ScoringPlan, Work, done_chunks, part_name, score, threads_of
from raydet.tables import storage
from raydet.tables.layout import FileGroups, groups_of
from raydet.tables.output_errors import refusal_of
from raydet.tables.output_folder import OutputFolder, RunRecord, open_folder
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import MANIFEST_NAME, is_table, open_table, read_footers, write_manifest

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Write errors of a disk that is full or read-only."""
INDEX_FILE = "_inputs.parquet"
MOST_ROWS_PER_FILE = 1024
"""Maximum rows of a detections file, a few megabytes; a kill loses the work on each file in flight."""
MOST_PARTS_AT_A_TIME = 50_000
"""Maximum parts of one execution of the pipeline (800,000 images in batches of 16); then it is restarted."""
_IMAGES_PER_TILED_PART = 4
"""Small, because images large enough for tiling take many megabytes of pixels each."""
_LOSSES = (
    ConnectionError,
    OSError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RayActorError,
    ray.exceptions.RaySystemError,
    RpcError,
    ray.exceptions.WorkerCrashedError,
)
"""Lost nodes, processes and connections: a restart of the pipeline can succeed, unlike after a defect."""
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NO_MEMORY = (MemoryError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectStoreFullError)
_RESUME_HINT = "run the same command again to resume"


@dataclass(frozen=True)
class PredictResult:
    """Result of a scoring run.

    Attributes:
        out: Folder or URI of the detections table.
        num_images: Rows of the table, one per image.
        num_errors: Rows whose image could not be read.
        num_detections: Detections in all rows.
        already_done: True if the run was finished before this call.
        report: Lines of the job report for the terminal.
    """

    out: str
    num_images: int
    num_errors: int
    num_detections: int
    already_done: bool = False
    report: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return a summary of the run for the terminal."""
        first = ["nothing to do: this run is finished"] if self.already_done else []
        errors = f" ({self.num_errors:,} unreadable)" if self.num_errors else ""
        return [
            *self.report,
            *first,
            f"{self.num_images:,} images{errors}; {self.num_detections:,} detections",
            f"detections: {self.out}",
        ]


@dataclass(frozen=True)
class _ModelFacts:
    """Facts about a model that are known before it is loaded."""

    name: str
    categories: tuple[Category, ...]
    fingerprint: str
    pads: bool


def predict(config: PredictConfig, *, console: Console | None = None) -> PredictResult:
    """Score every image of a collection; an interrupted run resumes.

    Raises:
        UserError: The collection, the model or the output folder is invalid. Nothing has been written.
        RunError: The run failed. The files written so far are complete; the same command resumes the run.
    """
    console = console or Console()
    model = _check_model(config)
    # Absolute, because workers have other working directories and the run's identity must not depend on this one.
    config = dataclasses.replace(
        config,
        out=storage.absolute_uri(config.out),
        data=storage.absolute_uri(config.data),
        checkpoint=model.name if config.checkpoint else None,
        model=model.name if config.model else None,
    )
    with open_folder(config.out, command="predict", notify=console.line) as folder:
        return _predict_into(folder, config, model, console)


def _predict_into(folder: OutputFolder, config: PredictConfig, model: _ModelFacts, console: Console) -> PredictResult:
    if not folder.refuse_foreign():  # left by a run that stopped before its start; files may have been added since
        folder.delete_file(INDEX_FILE)
    images = open_collection(config.data, index_uri=folder.uri_of(INDEX_FILE)).first(config.limit)
    run_identity = {
        **identity(config),
        "checkpoint_fingerprint": model.fingerprint,
        "data_fingerprint": images.fingerprint,
    }
    earlier = folder.admit(run_identity)
    if is_table(folder.uri):
        drawn = _draw(config, model, images)
        return dataclasses.replace(_result(folder, already_done=True), report=tuple(drawn))
    return _run(config, model, images, run_identity, earlier, console, folder)


def _check_model(config: PredictConfig) -> _ModelFacts:
    if config.model is not None:
        from raydet.engines.zero_shot import check_labels, check_zero_shot

        check_zero_shot(config.model)
        labels = check_labels(config.labels or ())
        if config.precision == "fp16" and config.use_gpu is False:
            raise no_fp16_on_cpu(config.engine)
        name = storage.absolute_uri(config.model) if storage.exists(config.model) else config.model
        categories = tuple(Category(id=index, name=label) for index, label in enumerate(labels))
        model = _ModelFacts(name, categories, fingerprint(config.model), pads=False)
    else:
        assert config.checkpoint is not None, "the config asks for a checkpoint or a model"
        checkpoint = read_checkpoint(config.checkpoint)
        family = family_of(checkpoint.model_type, where=config.checkpoint)
        check_engine(config, checkpoint.model_type)
        if not checkpoint.categories:
            raise UserError(f"the model {checkpoint.name} defines no classes: its config.json has no id2label")
        model = _ModelFacts(
            checkpoint.name, checkpoint.categories, fingerprint(config.checkpoint), pads=family.side_multiple == 1
        )
    if config.reduced_decode and (config.tile or config.model):
        reason = "tiles are cut from the full-size image" if config.tile else "it requires a trained detector"
        raise UserError(
            f"--reduced-decode cannot be combined with {'--tile' if config.tile else 'a zero-shot model'}: {reason}"
        )
    check_classes(config.classes, model.categories)
    return model


def _run(
    config: PredictConfig,
    model: _ModelFacts,
    images: Collection,
    run_identity: dict[str, Any],
    earlier: RunRecord | None,
    console: Console,
    folder: OutputFolder,
) -> PredictResult:
    started = time.perf_counter()
    stats = JobStats()
    with session.session(folder.uri_of(LOG_FOLDER)):
        resources = _share_out(config)
        log = folder.uri_of(LOG_FOLDER, LOG_FILE)
        console.line(f"{resources.describe(config.num_workers, config.num_workers)}. Ray log: {log}")
        if resources.notice:
            console.line(resources.notice)
        if resources.use_gpu is False and config.precision == "fp16":
            raise no_fp16_on_cpu(config.engine)
        _check_nodes(config)
        work = _work(config, model, images, run_identity, earlier, resources, folder)
        reason, job = None, JobRecord.of_this_job(num_workers=config.num_workers, resources=resources)
        try:
            with console.status("starting workers") as update:
                _score_all(work, resources, stats, update, console)
        except BaseException as error:
            reason = _reason(error)
            raise
        finally:
            wall_s = time.perf_counter() - started
            if reason is None:
                job = job.with_joined_nodes()
            report = _write_report(folder, config, stats, wall_s=wall_s, job=job, error=reason)
    _finish(folder, config, work.plan, images.id_space)
    drawn = _draw(config, model, images)
    return dataclasses.replace(_result(folder), report=(*report.lines(), *drawn))


def _write_report(
    folder: OutputFolder,
    config: PredictConfig,
    stats: JobStats,
    *,
    wall_s: float,
    job: JobRecord,
    error: str | None,
) -> JobReport:
    """Write OUT/job.json, also for a failed run; a full disk is reported elsewhere."""
    earlier = None
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(folder.read_bytes(JOB_FILE))
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
        folder.write_bytes(json.dumps(without_secrets(report.to_dict()), indent=1).encode(), JOB_FILE)
    return report


def _check_nodes(config: PredictConfig) -> None:
    """Check that every node sees the images, the checkpoint and the output."""
    reads = {}
    if is_table(config.data):
        reads["--data"] = (config.data, storage.join(config.data, MANIFEST_NAME))
    elif not is_pattern(config.data):
        reads["--data"] = (config.data, config.data)
    for option, name in (("--checkpoint", config.checkpoint), ("--model", config.model)):
        if name is not None and storage.exists(storage.join(name, "config.json")):  # otherwise a Hub name
            reads[option] = (name, storage.join(name, "config.json"))
    check_shared(reads=reads, writes=(config.out, storage.join(config.out, LOG_FOLDER)))


def _draw(config: PredictConfig, model: _ModelFacts, images: Collection) -> list[str]:
    if not config.draw:
        return []
    gallery = GalleryPainter(
        config.out, model.categories, config.draw, config.draw_if, config.draw_threshold, max_pixels=config.max_pixels
    )
    report: GalleryReport = gallery.draw(images, gallery.choose(open_table(config.out, "detections")))
    return report.lines()


def _work(
    config: PredictConfig,
    model: _ModelFacts,
    images: Collection,
    run_identity: dict[str, Any],
    earlier: RunRecord | None,
    resources: shares.Resources,
    folder: OutputFolder,
) -> Work:
    """Build the shared work of the run; a probe on a worker determines the values that require the loaded model."""
    plan = None if earlier is None else earlier.plan
    reduce_to, batch_size = None, config.batch_size
    if config.reduced_decode or (batch_size == "auto" and plan is None):
        probe = ray.remote(_probe).options(num_cpus=resources.cpus_per_worker, num_gpus=int(resources.use_gpu))
        try:
            reduce_to, found = ray.get(probe.remote(config, resources))
        except ray.exceptions.RayTaskError as error:
            _raise_if_permanent(error, config)
            raise
        batch_size = found if batch_size == "auto" else batch_size
    if plan is None:
        assert isinstance(batch_size, int), "the probe returns a batch size"
        plan = dataclasses.asdict(_plan(config, images.num_rows, batch_size))
        folder.begin(run_identity, plan=plan)
    if isinstance(config.batch_size, int):  # chunks and parts stay as planned
        plan = {**plan, "batch_size": config.batch_size}
    return Work(
        config=config,
        folder=folder,
        model_fingerprint=model.fingerprint,
        images=images,
        plan=ScoringPlan(**plan),
        schema=build_schema("detections", model.categories, extra_metadata={"checkpoint": without_secrets(model.name)}),
        sorts_by_shape=model.pads and config.pad_batches,
        reduce_to=reduce_to if config.reduced_decode else None,
    )


def _probe(config: PredictConfig, resources: shares.Resources) -> tuple[ResizeRule | None, int]:
    """Return the model's resize rule and batch size, measured on this worker if `batch_size` is "auto"."""
    from raydet.engines.batch_size import best_batch_size
    from raydet.engines.loading import load_engine

    has_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
    engine = load_engine(config, device="cuda" if has_gpu else "cpu", num_threads=threads_of(config, resources))
    batch_size = best_batch_size(engine) if config.batch_size == "auto" else config.batch_size
    return engine.resize_rule, batch_size


def _plan(config: PredictConfig, num_rows: int, batch_size: int) -> ScoringPlan:
    images_per_part = max(1, batch_size // 2) if config.flip else batch_size
    if config.tile:
        images_per_part = _IMAGES_PER_TILED_PART
    # Several files per worker, so that none idles at the end, but not many small ones.
    rows_per_file = config.rows_per_file or min(MOST_ROWS_PER_FILE, math.ceil(num_rows / (4 * config.num_workers)))
    rows_per_file = math.ceil(rows_per_file / images_per_part) * images_per_part
    return ScoringPlan(
        num_rows=num_rows, rows_per_file=rows_per_file, images_per_part=images_per_part, batch_size=batch_size
    )


def _share_out(config: PredictConfig) -> shares.Resources:
    return shares.share_out(
        min_workers=config.num_workers,
        max_workers=config.num_workers,
        # The other engines run on CPUs and would leave a reserved GPU idle.
        use_gpu=config.use_gpu if config.engine == "torch" else False,
        cpus_per_worker=config.cpus_per_worker,
    )


def _score_all(
    work: Work,
    resources: shares.Resources,
    stats: JobStats,
    update: Callable[[str], None],
    console: Console,
) -> None:
    """Score all remaining chunks; restart the pipeline when the cluster loses workers or nodes."""
    failures, num_workers = 0, work.config.num_workers
    while True:
        done = done_chunks(work.folder)
        left = [chunk for chunk in range(work.plan.num_chunks) if chunk not in done]
        if not left:
            return
        # Ray Data keeps some kilobytes per finished part until its execution ends.
        left = left[: max(1, MOST_PARTS_AT_A_TIME // work.plan.parts_per_chunk)]
        num_rows = sum(len(work.plan.rows_of(chunk)) for chunk in done)
        try:
            for file_stats in score(work, left, resources, num_workers=num_workers):
                work.folder.check()
                stats.add(file_stats)
                num_rows += file_stats.num_images
                update(f"{num_rows:,} of {work.plan.num_rows:,} images")
        except (ray.exceptions.RayError, SystemException, ExecutionTimeoutError, OSError) as error:
            _raise_if_permanent(error, work.config, work.plan.batch_size)
            reason = _reason(_causes(error)[-1])
        else:
            reason = "output files are missing"
            if done_chunks(work.folder).issuperset(left):
                continue
        failures = 1 if done_chunks(work.folder) > done else failures + 1
        if failures > work.config.max_failures:
            raise RunError(
                f"the cluster failed too often ({reason}); the limit is --max-failures {work.config.max_failures}; "
                f"{_RESUME_HINT}"
            )
        # An autoscaling cluster may have room again later; any other continues with the workers that fit.
        num_workers = min(work.config.num_workers, shares.workers_that_fit(resources)) or work.config.num_workers
        console.line(f"the cluster lost workers or nodes ({reason}); continuing with {num_workers} workers")


def _raise_if_permanent(error: Exception, config: PredictConfig, batch_size: int | None = None) -> None:
    """Raise an error if a restart cannot help; return if the cluster lost workers, nodes or connections."""
    chain = _causes(error)
    for cause in chain:
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        if isinstance(cause, OSError) and (storage.has_code(cause, *_REFUSALS) or isinstance(cause, PermissionError)):
            raise refusal_of(cause, config.out) from error
        if isinstance(cause, _NO_MEMORY) or "out of memory" in str(cause).lower():
            raise RunError(
                f"out of memory with batches of {batch_size or 1} and {config.num_workers} workers: lower --batch-size "
                f"or --num-workers; {_RESUME_HINT}"
            ) from error
    is_defect = any(getattr(cause, "actor_init_failed", False) for cause in chain)
    if not is_defect and any(isinstance(cause, _LOSSES) for cause in chain):
        return
    log = storage.join(config.out, LOG_FOLDER, "error.log")
    storage.write_bytes(log, without_secrets("".join(traceback.format_exception(error))).encode())
    raise RunError(f"a worker failed: {_reason(chain[-1])}; traceback: {log}") from error


def _causes(error: BaseException) -> list[BaseException]:
    """List an error and its causes, outermost first, without Ray's wrappers around errors of its workers."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        if not isinstance(following, ray.exceptions.RayTaskError) or following.cause is None:
            chain.append(following)
        # If an actor could not be created, the error of its constructor is the first argument.
        inner = [item for item in following.args if isinstance(item, BaseException)]
        following = getattr(following, "cause", None) or following.__cause__ or next(iter(inner), None)
    return chain or [error]


def _reason(error: BaseException) -> str:
    line = first_line(_TERMINAL_COLOURS.sub("", str(error)), otherwise="no message")
    return f"{type(error).__name__}: {line}"


def _finish(folder: OutputFolder, config: PredictConfig, plan: ScoringPlan, id_space: str | None) -> None:
    """Check that there is one row per image and write the manifest, which marks the table as complete."""
    names = [part_name(chunk) for chunk in range(plan.num_chunks)]
    groups_by_file: dict[str, FileGroups] = {}
    totals = {"num_errors": 0, "num_detections": 0}
    for name, footer in zip(names, read_footers(folder.uri, names), strict=True):
        groups_by_file[name] = groups_of(footer)
        for key, count in json.loads(footer.metadata[COUNTS_KEY]).items():
            totals[key] += count
    num_rows = sum(num_rows for groups in groups_by_file.values() for num_rows, _ in groups)
    assert num_rows == plan.num_rows, f"{num_rows} rows for {plan.num_rows} images"
    write_manifest(folder.uri, groups_by_file, config_hash=config_hash(config), id_space=id_space, **totals)


def _result(folder: OutputFolder, *, already_done: bool = False) -> PredictResult:
    manifest = json.loads(folder.read_bytes(MANIFEST_NAME))
    return PredictResult(
        folder.uri, manifest["num_rows"], manifest["num_errors"], manifest["num_detections"], already_done=already_done
    )
