"""Batch inference: images and a checkpoint → a detections table, one row for each image, whatever dies on the way.

This is the driver: it checks what it is given, cuts the images into chunks, has the pipeline score those that are not
done yet, and counts the result. What runs on the cluster is in `inference_stream.py`.
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

import pyarrow.parquet as pq
import ray

from raydet.cluster import session, shares
from raydet.cluster.caller import LOG_FILE
from raydet.cluster.job_record import JOB_FILE, JobRecord
from raydet.cluster.job_report import JobReport, JobStats
from raydet.cluster.ray_internals import ExecutionTimeoutError, RpcError, SystemException
from raydet.cluster.shared_storage import check_shared
from raydet.common.console import Console
from raydet.common.errors import RunError, UserError
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
from raydet.tables.output_errors import refusal_of
from raydet.tables.output_folder import OutputFolder, RunRecord, open_folder
from raydet.tables.schema import Category, build_schema
from raydet.tables.table import MANIFEST_NAME, is_table, open_table, write_manifest

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Of writing: the disk is full, or may not be written to."""
INDEX_FILE = "_inputs.parquet"
MOST_ROWS_PER_FILE = 1024
"""Rows of a detections file, a few megabytes; what a kill may cost is as much again for each in flight."""
MOST_PARTS_AT_A_TIME = 50_000
"""Parts of one execution of the pipeline, 800,000 images in batches of 16; then it is started anew."""
_IMAGES_PER_TILED_PART = 4
"""Pictures large enough to be cut into tiles are many megabytes of pixels each."""
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
"""Of the cluster or of a connection: the rest of the work can go on, unlike with a defect, which would come again."""
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NO_MEMORY = (MemoryError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectStoreFullError)
_WHOLE = "run the same command again to resume"


@dataclass(frozen=True)
class PredictResult:
    """What a scoring run came to.

    Attributes:
        out: The detections table.
        num_images: Rows of the table, one for each image.
        num_errors: Those whose image could not be read.
        num_detections: In all rows together.
        already_done: Nothing was left to do.
        report: A table of what it took, for the terminal.
    """

    out: str
    num_images: int
    num_errors: int
    num_detections: int
    already_done: bool = False
    report: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """A summary of the run, for the terminal."""
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
    """What is known of a model before it is loaded."""

    name: str
    categories: tuple[Category, ...]
    fingerprint: str
    pads: bool


def predict(config: PredictConfig, *, console: Console | None = None) -> PredictResult:
    """Scores every image; run again after a kill, it does what is left.

    Raises:
        UserError: Collection, model or output folder are not what they should be. Nothing has been written then.
        RunError: The run cannot go on. What was written is whole, and the same command goes on from there.
    """
    console = console or Console()
    model = _check_model(config)
    # Workers have other working directories, and a run is the same whichever one it is started from.
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
    folder.refuse_foreign()
    if folder.record() is None:  # left by a run that ended before it began: files may have come since
        folder.delete_file(INDEX_FILE)
    images = open_collection(config.data, index_uri=folder.uri_of(INDEX_FILE))
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
            raise UserError(f"the model {checkpoint.name} names no classes (no id2label in its config.json)")
        model = _ModelFacts(
            checkpoint.name, checkpoint.categories, fingerprint(config.checkpoint), pads=family.side_multiple == 1
        )
    if config.reduced_decode and (config.tile or config.model):
        reason = "tiles are cut out of the full picture" if config.tile else "it is for trained detectors"
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
        if resources.remark:
            console.line(resources.remark)
        if resources.use_gpu is False and config.precision == "fp16":
            raise no_fp16_on_cpu(config.engine)
        _check_nodes(config)
        work = _work(config, model, images, run_identity, earlier, resources, folder)
        reason, job = None, JobRecord.of_this_job()
        try:
            with console.status("starting workers") as update:
                _score_all(work, resources, stats, update, console)
        except BaseException as error:
            reason = _first_line(error)
            raise
        finally:
            wall_s = time.perf_counter() - started
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
    """Writes OUT/job.json, also of a run that has failed; a full disk has a line of its own then."""
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
    """Makes sure that every node sees the images, the checkpoint and the output."""
    reads = {}
    if is_table(config.data):
        reads["--data"] = (config.data, storage.join(config.data, MANIFEST_NAME))
    elif not is_pattern(config.data):
        reads["--data"] = (config.data, config.data)
    for option, name in (("--checkpoint", config.checkpoint), ("--model", config.model)):
        if name is not None and storage.exists(storage.join(name, "config.json")):  # or it is a name on the Hub
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
    """Says what the workers need to know; asks one of them where that takes the model itself."""
    plan = None if earlier is None else earlier.plan
    reduce_to, batch_size = None, config.batch_size
    if config.reduced_decode or (batch_size == "auto" and plan is None):
        probe = ray.remote(_probe).options(num_cpus=resources.cpus_per_worker, num_gpus=int(resources.use_gpu))
        try:
            reduce_to, found = ray.get(probe.remote(config, resources))
        except ray.exceptions.RayTaskError as error:
            _raise_what_will_come_again(error, config)
            raise
        batch_size = found if batch_size == "auto" else batch_size
    if plan is None:
        assert isinstance(batch_size, int), "the probe has found a batch size"
        plan = dataclasses.asdict(_plan(config, images.num_rows, batch_size))
        folder.begin(run_identity, plan=plan)
    if isinstance(config.batch_size, int):  # the cut into chunks and parts stays
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
    """On a worker: the model's resize, and the batch size that suits it where that is asked for."""
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
    # Some files for each worker, so that none is idle while the last ones are made, and not many small ones.
    rows_per_file = config.rows_per_file or min(MOST_ROWS_PER_FILE, math.ceil(num_rows / (4 * config.num_workers)))
    rows_per_file = math.ceil(rows_per_file / images_per_part) * images_per_part
    return ScoringPlan(
        num_rows=num_rows, rows_per_file=rows_per_file, images_per_part=images_per_part, batch_size=batch_size
    )


def _share_out(config: PredictConfig) -> shares.Resources:
    return shares.share_out(
        min_workers=config.num_workers,
        max_workers=config.num_workers,
        # The other engines run on CPUs: a GPU would be held and left idle.
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
    """Scores what is left until nothing is; starts the pipeline again when the cluster has lost a part of itself."""
    failures, num_workers = 0, work.config.num_workers
    while True:
        done = done_chunks(work.folder)
        left = [chunk for chunk in range(work.plan.num_chunks) if chunk not in done]
        if not left:
            return
        # Ray Data keeps some kilobytes for each part that has passed until its execution ends.
        left = left[: max(1, MOST_PARTS_AT_A_TIME // work.plan.parts_per_chunk)]
        num_rows = sum(len(work.plan.rows_of(chunk)) for chunk in done)
        try:
            for file_stats in score(work, left, resources, num_workers=num_workers):
                work.folder.check()
                stats.add(file_stats)
                num_rows += file_stats.num_images
                update(f"{num_rows:,} of {work.plan.num_rows:,} images")
        except (ray.exceptions.RayError, SystemException, ExecutionTimeoutError, OSError) as error:
            _raise_what_will_come_again(error, work.config, work.plan.batch_size)
            reason = _first_line(_causes(error)[-1])
        else:
            reason = "files are missing"
            if done_chunks(work.folder).issuperset(left):
                continue
        failures = 1 if done_chunks(work.folder) > done else failures + 1
        if failures > work.config.max_failures:
            raise RunError(f"the cluster has failed too often: {reason}; {_WHOLE}")
        # A cluster that grows by itself may have room again later; one that does not must do with what it has.
        num_workers = min(work.config.num_workers, shares.workers_that_fit(resources)) or work.config.num_workers
        console.line(f"the cluster lost workers or nodes ({reason}); continuing with {num_workers} workers")


def _raise_what_will_come_again(error: Exception, config: PredictConfig, batch_size: int | None = None) -> None:
    """Ends the run where starting the workers once more would be no use; returns where they or a node were lost."""
    chain = _causes(error)
    for cause in chain:
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        if isinstance(cause, OSError) and (storage.has_code(cause, *_REFUSALS) or isinstance(cause, PermissionError)):
            raise refusal_of(cause, config.out) from error
        if isinstance(cause, _NO_MEMORY) or "out of memory" in str(cause).lower():
            raise RunError(
                f"out of memory in batches of {batch_size or 1} with {config.num_workers} workers; choose a smaller "
                f"--batch-size or fewer workers; {_WHOLE}"
            ) from error
    is_defect = any(getattr(cause, "actor_init_failed", False) for cause in chain)
    if not is_defect and any(isinstance(cause, _LOSSES) for cause in chain):
        return
    log = storage.join(config.out, LOG_FOLDER, "error.log")
    storage.write_bytes(log, without_secrets("".join(traceback.format_exception(error))).encode())
    raise RunError(
        f"a worker came upon what it cannot handle ({_first_line(chain[-1])}); {log} has the traceback"
    ) from error


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it was caused by, outermost first, without Ray's wrapping of what its workers raise."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        if not isinstance(following, ray.exceptions.RayTaskError) or following.cause is None:
            chain.append(following)
        # Of an actor that could not be made, what its constructor raised is the first argument.
        inner = [item for item in following.args if isinstance(item, BaseException)]
        following = getattr(following, "cause", None) or following.__cause__ or next(iter(inner), None)
    return chain or [error]


def _first_line(error: BaseException) -> str:
    text = _TERMINAL_COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _finish(folder: OutputFolder, config: PredictConfig, plan: ScoringPlan, id_space: str | None) -> None:
    """Counts what was written against what was asked for and declares the table whole."""
    filesystem, path = storage.resolve(folder.uri)
    rows_by_file: dict[str, int] = {}
    totals = {"num_errors": 0, "num_detections": 0}
    for name in map(part_name, range(plan.num_chunks)):
        footer = pq.read_metadata(f"{path}/{name}", filesystem=filesystem)
        rows_by_file[name] = footer.num_rows
        for key, count in json.loads(footer.metadata[COUNTS_KEY]).items():
            totals[key] += count
    num_rows = sum(rows_by_file.values())
    assert num_rows == plan.num_rows, f"{num_rows} rows were written for {plan.num_rows} images"
    write_manifest(folder.uri, rows_by_file, config_hash=config_hash(config), id_space=id_space, **totals)


def _result(folder: OutputFolder, *, already_done: bool = False) -> PredictResult:
    manifest = json.loads(folder.read_bytes(MANIFEST_NAME))
    return PredictResult(
        folder.uri, manifest["num_rows"], manifest["num_errors"], manifest["num_detections"], already_done=already_done
    )
