"""`raydet prepare`: a source of images → images tables, with anomalies listed in OUT/__rejected and OUT/__findings.

Every image is read and checked, so that each image in a table is readable and has the stated size. Every image found is
either accepted or rejected, rows keep the source's order, and the user's files are never written to.

Anomalies are handled as follows:

- An image that cannot be read or decoded, whose path leads out of its folder, or whose own labels cannot be read is
  rejected.
- An image without labels, of a format that cannot mark it as empty, is kept or rejected as `unlabelled` says.
- A box that extends beyond its image is clipped. A box without area, with a number that is not finite, or entirely
  outside is dropped, and so are annotations of an unknown image or category.
- A box that repeats another of its class is kept, because COCO's numbers are computed against the annotations as they
  are. `duplicate_boxes: drop` drops it.
- An image with the same bytes as an earlier one is kept, since its path, id and labels are its own.
  `duplicate_images: drop` rejects it. A split never separates the two.
- An image without boxes is kept as a negative example.

Each is counted, and listed in OUT/__rejected (images) or OUT/__findings (everything else).
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

from raydet.common.console import Console
from raydet.common.ray_address import is_connected
from raydet.common.redaction import refuse_password
from raydet.common.threads import NUM_READ_THREADS, available_cpus
from raydet.config import (
    PrepareCocoConfig,
    PrepareConfig,
    PrepareCsvConfig,
    PrepareCvatConfig,
    PrepareDetectionsConfig,
    PrepareHubConfig,
    PrepareImagesConfig,
    PrepareLabelStudioConfig,
    PrepareShapesConfig,
    PrepareTableConfig,
    PrepareVocConfig,
    PrepareYoloConfig,
    config_hash,
    identity,
)
from raydet.config.fields import with_options
from raydet.images.files import ImageFolder
from raydet.preparation.examining import ImageReader, draw_row, read_row
from raydet.preparation.locating import refuse_other_folder
from raydet.preparation.parts import FILE_BYTES, SURVEY_IMAGES
from raydet.preparation.report import PrepareReport, sum_reports
from raydet.preparation.sources import shapes
from raydet.preparation.sources.coco import read_coco
from raydet.preparation.sources.images import read_images
from raydet.preparation.sources.lists import ImageList, is_list, read_list
from raydet.preparation.sources.scored.rows import TableImages, open_images
from raydet.preparation.sources.source import Source, SourceImage, labelled_for
from raydet.preparation.sources.tools.csv_labels import read_csv
from raydet.preparation.sources.tools.cvat import read_cvat
from raydet.preparation.sources.tools.label_studio import read_label_studio
from raydet.preparation.sources.voc import read_voc
from raydet.preparation.sources.yolo import read_yolo
from raydet.preparation.sources.yolo_files import find_files
from raydet.preparation.target import Target
from raydet.preparation.writing import PreparationPlan, write_tables
from raydet.tables import storage
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import open_folder
from raydet.tables.table import SPLITS, open_table

_Opened = tuple[Source, ImageReader]
_RAY_FROM_IMAGES = 5_000
"""On an existing cluster: below this, starting the tasks takes as long as the work."""
_OWN_RAY_FROM_IMAGES, _OWN_RAY_FROM_CPUS = 50_000, 8
"""On a single machine: Ray takes about ten seconds to start, and threads can keep a few CPUs busy."""
_THREADS_PER_TASK = 2
_SIZES_SAMPLED, _MOST_LOOKED_AT = 64, 10_000
_BYTES_UNKNOWN = 128 * 2**10
_BYTES_OF_REFERENCE = 16 * 2**10
"""Represents the work of reading an image, of which hardly anything is stored."""


@with_options(PrepareCocoConfig)
def prepare_coco(config: PrepareCocoConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table from a COCO instances file and its images.

    Boxes refer to the upright image, as annotation tools show it. If the JSON states the size that the file has before
    its EXIF rotation by a quarter turn, the boxes were drawn on the unrotated image and are rotated with it. Any other
    difference in size is counted and leaves the boxes unchanged.

    Raises:
        UserError: The annotations or the folder are missing or invalid, no image can be read, or OUT holds other files.
        RunError: Storage or cluster failed.
    """
    return _prepare(config, partial(_in_folder, read_coco), console=console)


@with_options(PrepareVocConfig)
def prepare_voc(config: PrepareVocConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table from Pascal VOC XML files and their images; `sources/voc.py` describes the format.

    Boxes refer to the upright image or are rotated with it, as in `prepare_coco`, which states the other errors too.

    Raises:
        UserError: The split is missing or invalid, no XML file belongs to an image, or no class is named.
    """
    return _prepare(config, partial(_in_folder, read_voc), console=console)


@with_options(PrepareYoloConfig)
def prepare_yolo(config: PrepareYoloConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table from images and YOLO label files; `sources/yolo.py` describes the format.

    Boxes are relative to the upright image, as in Ultralytics. `prepare_coco` states the other errors.

    Raises:
        UserError: data.yaml or a list is missing or invalid, or no image has a label file.
    """
    return _prepare(config, _open_yolo, console=console)


@with_options(PrepareCsvConfig)
def prepare_csv(config: PrepareCsvConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table from a CSV file with a box per row; `sources/tools/csv_labels.py` describes the format.

    Boxes refer to the upright image or are rotated with it, and errors are raised, as in `prepare_coco`.
    """
    return _prepare(config, partial(_in_folder, read_csv), console=console)


@with_options(PrepareCvatConfig)
def prepare_cvat(config: PrepareCvatConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table from CVAT's XML and its images; `sources/tools/cvat.py` describes the format.

    Boxes refer to the upright image or are rotated with it, and errors are raised, as in `prepare_coco`.
    """
    return _prepare(config, partial(_in_folder, read_cvat), console=console)


@with_options(PrepareLabelStudioConfig)
def prepare_label_studio(config: PrepareLabelStudioConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table from Label Studio's JSON; `sources/tools/label_studio.py` describes the format.

    Boxes refer to the upright image or are rotated with it, and errors are raised, as in `prepare_coco`.
    """
    return _prepare(config, partial(_in_folder, read_label_studio), console=console)


@with_options(PrepareHubConfig)
def prepare_hub(config: PrepareHubConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table from a data set that `datasets` opens; see `raydet.preparation.sources.hub`.

    Errors are those of `prepare_coco`, of which a missing split or column is one too.
    """
    return _prepare(config, _open_hub, console=console)


@with_options(PrepareImagesConfig)
def prepare_images(config: PrepareImagesConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table, without boxes, from all image files below a folder, or from a list.

    A list (`sources/lists.py`) may contain URLs. An image that a server does not deliver is rejected and does not end
    the run. Errors are those of `prepare_coco`.
    """
    return _prepare(config, _open_images, console=console)


@with_options(PrepareDetectionsConfig)
def prepare_detections(config: PrepareDetectionsConfig, *, console: Console | None = None) -> PrepareReport:
    """Make an images table whose boxes are a model's detections; see `sources/scored/detections.py`.

    Images that the model could not read are rejected. The table's metadata names the model and the thresholds.

    Raises:
        UserError: A table is missing or damaged, the detections are not those of the images, the thresholds are
            invalid, no image can be read, or OUT holds other files.
        RunError: Storage or cluster failed.
    """
    return _prepare(config, _open_detections, console=console)


def _in_folder(read: Callable[[Any, ImageFolder], Source], config: Any) -> _Opened:
    """Read a source whose images lie below `config.images`."""
    folder = ImageFolder(config.images, allow_root=config.allow_root)
    return read(config, folder), folder


def _open_yolo(config: PrepareYoloConfig) -> _Opened:
    files = find_files(config)
    return read_yolo(files, unlabelled=config.unlabelled), files.images


def _open_hub(config: PrepareHubConfig) -> _Opened:
    from raydet.preparation.sources.hub import load_hub
    from raydet.preparation.sources.hub_rows import read_hub

    images = load_hub(config)
    return read_hub(images, config), images


def _open_images(config: PrepareImagesConfig) -> _Opened:
    if is_list(config.images):
        images = ImageList(config.images)
        return read_list(images, for_reference=config.image_storage == "reference"), images
    return _in_folder(lambda _, folder: read_images(folder), config)


def _open_detections(config: PrepareDetectionsConfig) -> _Opened:
    from raydet.preparation.sources.scored.detections import read_detections

    images = open_images(config)
    return read_detections(images.table, open_table(config.detections, "detections"), config), images


@with_options(PrepareShapesConfig)
def prepare_shapes(
    config: PrepareShapesConfig, *, console: Console | None = None, file_bytes: int = FILE_BYTES
) -> PrepareReport:
    """Draw two images tables, OUT/train and OUT/val; the report counts both together.

    Raises:
        UserError: OUT/train or OUT/val holds other files.
    """
    sizes: dict[shapes.Split, int] = {"train": config.num_train, "val": config.num_val}
    plan = PreparationPlan(
        config_hash=config_hash(config),
        identity=_identity(config),
        images_per_part=max(1, file_bytes // config.image_size**2),
        num_threads=config.num_threads,
    )
    console = console or Console()
    with contextlib.ExitStack() as stack:
        targets = {
            split: Target(stack.enter_context(open_folder(storage.join(config.out, split), command="prepare")))
            for split in sizes
        }
        done = {split: _report_of(target, config, console) for split, target in targets.items()}
        reports = []
        for split, num_images in sizes.items():
            source = Source(partial(_name_shapes, split, num_images), num_images, shapes.CATEGORIES)
            draw = partial(draw_row, split=split, config=config)
            reports.append(done[split] or write_tables(targets[split], source, draw, plan, console))
    return sum_reports(config.out, reports, {split: target.out for split, target in targets.items()})


def _name_shapes(split: shapes.Split, num_images: int) -> Any:
    return (SourceImage(index, f"{split}/{index:06d}.jpg") for index in range(num_images))


def _prepare(
    config: PrepareTableConfig,
    open_source: Callable[[Any], _Opened],
    *,
    console: Console | None = None,
    file_bytes: int = FILE_BYTES,
    survey_images: int = SURVEY_IMAGES,
) -> PrepareReport:
    """Write the tables of a source into OUT, unless this configuration has written them before."""
    console = console or Console()
    with open_folder(config.out, command="prepare", notify=console.line) as out:
        target = Target(out, SPLITS if config.val_fraction is not None else ())
        if (done := _report_of(target, config, console)) is not None:
            if isinstance(config, PrepareDetectionsConfig):
                _refuse_changed_detections(config, target)
            return done
        with console.progress("reading the source"):
            source, reader = open_source(config)
            if isinstance(config, PrepareConfig) and config.labelled is not None:
                source = labelled_for(source, config.labelled)
        folder = reader if isinstance(reader, ImageFolder) else None
        if folder is not None:
            refuse_other_folder(source, folder)
        inline = config.image_storage == "inline"
        if not inline:
            refuse_password(getattr(reader, "uri", ""), what="--images")
        reads = _reads(reader)
        use_ray = _use_ray(config.use_ray, source.num_images, bool(reads))
        num_threads = _THREADS_PER_TASK if use_ray else available_cpus()
        is_remote = not getattr(reader, "is_local", False)
        plan = PreparationPlan(
            config_hash=config_hash(config),
            identity=_identity(config),
            images_per_part=max(1, file_bytes // (_mean_bytes(source, reader) if inline else _BYTES_OF_REFERENCE)),
            images_per_survey_part=survey_images,
            num_threads=config.num_threads or max(num_threads, NUM_READ_THREADS if is_remote else 1),
            use_ray=use_ray,
            reads=reads,
            val_fraction=config.val_fraction,
            seed=config.seed,
            drop_duplicate_images=config.duplicate_images == "drop",
        )
        examine = partial(
            read_row,
            reader=reader,
            inline=inline,
            max_pixels=config.max_pixels,
            drop_duplicate_boxes=config.duplicate_boxes == "drop",
            keep_truncated=isinstance(config, PrepareConfig) and config.truncated == "keep",
        )
        return write_tables(target, source, examine, plan, console)


def _identity(config: Any) -> dict[str, Any]:
    return {"source": type(config).__name__.removeprefix("Prepare").removesuffix("Config").lower(), **identity(config)}


def _report_of(target: Target, config: Any, console: Console) -> PrepareReport | None:
    manifest = target.manifest(_identity(config))
    if manifest is None:
        if target.folder.record() is not None:
            console.line(f"an earlier run left {target.out} unfinished; starting again from the first image")
        return None
    tables = {split: uri for split, uri in target.tables.items() if split}
    return PrepareReport(out=target.out, already_done=True, tables=tables, **manifest["prepare"])


def _refuse_changed_detections(config: PrepareDetectionsConfig, target: Target) -> None:
    from raydet.preparation.sources.scored.detections import refuse_changed

    refuse_changed(config, open_table(next(iter(target.tables.values())), "images"))


def _reads(reader: ImageReader) -> dict[str, tuple[str, str]]:
    """Return, by option, what holds the images, if every node of a cluster may open it."""
    if isinstance(reader, ImageFolder):
        return {"--images": (reader.uri, reader.uri)}
    if isinstance(reader, TableImages):
        return {"--data": (reader.table.uri, storage.join(reader.table.uri, MANIFEST_NAME))}
    return {}


def _use_ray(wanted: bool | None, num_images: int, is_shared: bool) -> bool:
    """Decide whether to use Ray tasks: every node can open a folder, but not a data set in this machine's cache."""
    if wanted is not None:
        return wanted
    if os.environ.get("RAY_ADDRESS") or is_connected():
        return is_shared and num_images >= _RAY_FROM_IMAGES
    return is_shared and num_images >= _OWN_RAY_FROM_IMAGES and available_cpus() >= _OWN_RAY_FROM_CPUS


def _mean_bytes(source: Source, reader: ImageReader) -> int:
    """Estimate the mean size of the images in bytes, in a folder from a regular sample."""
    if isinstance(reader, TableImages):
        return reader.mean_bytes
    if not isinstance(reader, ImageFolder):
        return _BYTES_UNKNOWN
    num_looked_at = min(source.num_images, _MOST_LOOKED_AT)
    step = max(1, num_looked_at // _SIZES_SAMPLED)
    sizes = [
        reader.size_of(image.locator or image.path)
        for image in islice(source.images, 0, num_looked_at, step)
        if image.refusal is None
    ]
    known = [size for size in sizes if size]
    return max(1, sum(known) // len(known)) if known else _BYTES_UNKNOWN
