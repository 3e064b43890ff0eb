"""`raydet.load`: a checkpoint → a model that detects objects in images in memory, without Ray."""

from collections.abc import Iterable, Iterator
from itertools import islice
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage
from PIL import ImageOps

from raydet.common.errors import UserError, one_line
from raydet.common.threads import available_cpus
from raydet.config import PredictConfig
from raydet.engines.in_memory.picture_detections import PictureDetections
from raydet.engines.loading import device_here, load_engine
from raydet.engines.scorer import Scorer
from raydet.images.decode import DecodeError, decode
from raydet.images.files import ReadError
from raydet.images.references import read_reference
from raydet.measuring.fitting.operating_point import read_point_of
from raydet.models.geometry import Image
from raydet.preparation.sources.web import WebReader
from raydet.tables import storage
from raydet.tables.schema import Category

Picture = str | PathLike[str] | bytes | PilImage.Image | npt.NDArray[np.uint8]
"""An image: a path, URI or web address, the content of a file, a PIL image, or RGB pixels, uint8 [H, W, 3]."""


def load(checkpoint: str | PathLike[str], *, score_threshold: float | None = None, **options: Any) -> "LoadedModel":
    """Load a model that detects objects in images in memory; it finds the boxes that `predict` writes.

    Args:
        checkpoint: Model folder, as written by `train`, or a Hub name; with `labels`, that of a zero-shot model.
        score_threshold: Detections at or below this score are dropped; by default 0.3, or the thresholds of the
            operating point with `operating_point=True`.
        options: Fields of `PredictConfig` for the model, its views and detections, such as `engine`, `precision`,
            `labels`, `tile`, `classes`, `use_gpu` or `batch_size`.

    Raises:
        UserError: The model does not exist, an option is unknown or has an impossible value, or this machine lacks what
            it requires.
    """
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise UserError(f"load() has no option {', '.join(unknown)}; it has {', '.join(sorted(_OPTIONS))}")
    if score_threshold is None:
        score_threshold = 0.0 if options.get("operating_point") else 0.3
    name = "model" if options.get("labels") is not None else "checkpoint"
    fields: dict[str, Any] = {name: str(checkpoint), "score_threshold": score_threshold, **options}
    return LoadedModel(PredictConfig(data="", **fields))


_OPTIONS = {
    "labels", "batch_size", "engine", "precision", "compile", "channels_last", "pad_batches", "resize_on", "max_pixels",
    "tile", "tile_overlap", "whole_image", "flip", "merge", "merge_iou", "classes", "top_k", "class_agnostic_nms",
    "operating_point", "use_gpu", "threads_per_worker",
}  # fmt: skip


class LoadedModel:
    """A model that detects objects in images in memory; `load` makes it.

    Attributes:
        categories: The classes in the order of their indices.
    """

    def __init__(self, config: PredictConfig) -> None:
        device = device_here(use_gpu=config.use_gpu, precision=config.precision, engine=config.engine)
        engine = load_engine(config, device=device, num_threads=config.threads_per_worker or available_cpus())
        if config.batch_size == "auto":
            raise UserError("load() needs a number as batch_size; only predict measures the fastest")
        self.categories: tuple[Category, ...] = engine.categories
        self._max_pixels = config.max_pixels
        self._batch_size = config.batch_size
        point = read_point_of(config, engine.categories)
        self._scorer = Scorer(engine, config, batch_size=self._batch_size, point=point)

    def __call__(self, images: Picture | Iterable[Picture]) -> Any:
        """Detect objects in one image, in a list of images, or, batch by batch, in those of any other iterable.

        Returns:
            `PictureDetections`, a list of them, or an iterator over them.

        Raises:
            UserError: An image cannot be read, or is of another type or shape than `Picture`.
        """
        if isinstance(images, str | PathLike | bytes | PilImage.Image | np.ndarray):
            return next(self._detect([images]))
        found = self._detect(images)
        return list(found) if isinstance(images, list | tuple) else found

    def _detect(self, pictures: Iterable[Picture]) -> Iterator[PictureDetections]:
        rest = iter(pictures)
        while batch := [self.pixels(picture) for picture in islice(rest, self._batch_size)]:
            for image, found in zip(batch, self._scorer.predict(self._scorer.prepare(batch)), strict=True):
                yield PictureDetections(image, found.boxes_xywh, found.scores, found.categories, self.categories)

    def pixels(self, picture: Any) -> Image:
        """Return the pixels of a `Picture`, RGB uint8 [H, W, 3], upright.

        Raises:
            UserError: The image cannot be read, or is of another type or shape.
        """
        if isinstance(picture, PilImage.Image):
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
                shape = " × ".join(map(str, picture.shape))
                raise UserError(f"an image must be RGB, uint8 [height, width, 3], got {picture.dtype} [{shape}]")
            return picture
        if not isinstance(picture, bytes | str | PathLike):
            kind = type(picture).__name__
            raise UserError(f"an image must be a path, an address, bytes, a PIL image or an array, got {kind}")
        try:
            content = picture if isinstance(picture, bytes) else _content(str(picture))
            return decode(content, max_pixels=self._max_pixels)
        except (DecodeError, ReadError, OSError) as error:
            name = "an image" if isinstance(picture, bytes) else str(picture)
            raise UserError(f"{name}: {one_line(error)}") from None


def _content(name: str) -> bytes:
    return WebReader().read(name) if storage.is_web(name) else read_reference(storage.absolute_uri(name))
