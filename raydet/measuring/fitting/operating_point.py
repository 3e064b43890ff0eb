"""The operating point of a checkpoint: `raydet.json` in its folder, and how it changes detections."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from raydet.common.errors import UserError
from raydet.common.untrusted.documents import DocumentError
from raydet.config import PredictConfig
from raydet.measuring.fitting.scores import ScoreMap, map_scores, passing
from raydet.models.checkpoints import OWN_FILE, fingerprint
from raydet.tables import storage
from raydet.tables.columns import Flags, Floats, Integers
from raydet.tables.schema import Category

_KEY = "operating_point"
_VERSION = 1
_REMEDY = "run raydet fit"


@dataclass(frozen=True, kw_only=True)
class FittedPoint:
    """Operating point of a detector, by category index of its checkpoint.

    Attributes:
        classes: Class names [C].
        thresholds: Lowest score that passes, as the model gives it, before calibration; None if no detection of the
            class passes [C].
        maps: Calibration of the scores; None leaves them as they are [C].
        class_agnostic_nms: IoU above which the lower-scoring of two passing boxes of any classes is dropped; None keeps
            both.
        target_precision: Precision that the thresholds were chosen for; None if for the best F1.
        model_fingerprint: Fingerprint of the checkpoint that the point was fitted for.
    """

    classes: tuple[str, ...]
    thresholds: tuple[float | None, ...]
    maps: tuple[ScoreMap | None, ...]
    class_agnostic_nms: float | None
    target_precision: float | None
    model_fingerprint: str

    def passes(self, scores: Floats, category: Integers) -> Flags:
        """Return True for each detection, [D], whose score reaches the threshold of its class."""
        return passing(self.thresholds, scores, category)

    def calibrated(self, scores: Floats, category: Integers) -> Floats:
        """Return the calibrated score of each detection, float64 [D]."""
        return map_scores(self.maps, scores, category)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the content."""
        return hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()[:16]

    def write(self, folder: str) -> str:
        """Write the point into the `raydet.json` of a model folder, atomically, in place of an earlier one.

        Returns:
            The file, whose other entries are kept.
        """
        file = storage.join(folder, OWN_FILE)
        others: Any = {}
        with contextlib.suppress(DocumentError):  # a damaged file is replaced
            others = storage.read_json(file) if storage.exists(file) else {}
        content = {**(others if isinstance(others, dict) else {}), _KEY: self._content()}
        storage.write_bytes(file, json.dumps(content, indent=1).encode())
        return file

    def _content(self) -> dict[str, Any]:
        return {"version": _VERSION, **dataclasses.asdict(self)}

    @classmethod
    def of_content(cls, content: Mapping[str, Any]) -> Self:
        """Check the content of a `raydet.json`.

        Raises:
            ValueError: It has another form; so do KeyError, TypeError and AttributeError.
        """
        own = dict(content[_KEY])
        if own.pop("version") != _VERSION:
            raise ValueError("another version")
        maps = tuple(None if item is None else ScoreMap.of_content(item) for item in own.pop("maps"))
        names, limits = tuple(map(str, own.pop("classes"))), own.pop("thresholds")
        thresholds = tuple(None if limit is None else float(limit) for limit in limits)
        point = cls(classes=names, thresholds=thresholds, maps=maps, **own)
        iou = point.class_agnostic_nms
        if not len(names) == len(thresholds) == len(maps) or not (iou is None or 0 < float(iou) <= 1):
            raise ValueError("the lists differ in length, or the IoU is not one")
        return point


def read_point_of(config: PredictConfig, categories: Sequence[Category]) -> FittedPoint | None:
    """Return the operating point that a config asks for, as `read_point` does."""
    if not config.operating_point:
        return None
    assert config.checkpoint is not None, "the config asks for a checkpoint"
    return read_point(config.checkpoint, [category.name for category in categories])


def read_point(checkpoint: str, class_names: Sequence[str]) -> FittedPoint:
    """Read the operating point of a checkpoint folder and check that it was fitted for this model.

    Raises:
        UserError: There is none, it is damaged, or the model has changed since.
    """
    file = storage.join(checkpoint, OWN_FILE)
    if not storage.exists(checkpoint):
        raise UserError(f"{checkpoint} is on the Hub: an operating point needs a checkpoint folder; download it first")
    try:
        content = storage.read_json(file) if storage.exists(file) else {}
        point = None if content.get(_KEY) is None else FittedPoint.of_content(content)
    except (DocumentError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); {_REMEDY} again") from None
    if point is None:
        raise UserError(
            f"{checkpoint} has no operating point (none in {OWN_FILE}); {_REMEDY} --checkpoint {checkpoint}"
        )
    if point.classes != tuple(class_names) or point.model_fingerprint != fingerprint(checkpoint):
        raise UserError(f"{file} was fitted for another model: {checkpoint} has changed since; {_REMEDY} again")
    return point
