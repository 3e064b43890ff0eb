"""The objects that a model has found in one image, with what people do with them: filter, draw, convert."""

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image as PilImage

from raydet.common.boxes import Boxes, xywh_to_xyxy
from raydet.engines.selection import check_classes
from raydet.images.drawing import class_colours, draw_boxes
from raydet.models.geometry import Image
from raydet.tables.schema import Category


@dataclass(frozen=True, eq=False, repr=False)
class PictureDetections:
    """Detections in one image, in descending score order. A notebook shows them drawn on the image.

    Attributes:
        image: The upright image, uint8 RGB [H, W, 3].
        boxes_xywh: float64 [N, 4], absolute pixels of the image.
        scores: float64 [N], above 0, at most 1.
        class_indices: int64 [N], indices into `categories`.
        categories: The model's classes in the order of their indices.
    """

    image: Image
    boxes_xywh: Boxes
    scores: npt.NDArray[np.float64]
    class_indices: npt.NDArray[np.int64]
    categories: tuple[Category, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        lines = [f"{len(self)} objects in an image of {self.image.shape[1]} × {self.image.shape[0]} pixels"]
        for name, score, box in zip(self.class_names, self.scores, self.boxes_xywh, strict=True):
            lines.append(f"{name} {score:.3f} [{', '.join(f'{value:.1f}' for value in box)}]")
        return "\n".join(lines)

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.draw().save(content, "PNG")
        return content.getvalue()

    @property
    def class_names(self) -> list[str]:
        """Class name of each detection."""
        return [self.categories[index].name for index in self.class_indices]

    def filter(
        self, *, score_threshold: float = 0.0, classes: Sequence[str] | None = None, top_k: int | None = None
    ) -> Self:
        """Return the detections above a score, of some classes, and at most `top_k` of them, the best ones.

        Raises:
            UserError: The model does not know a class.
        """
        kept = self.scores > score_threshold
        if classes is not None:
            kept &= np.isin(self.class_indices, check_classes(classes, self.categories) or ())
        places = np.flatnonzero(kept)[:top_k]
        parts = self.boxes_xywh[places], self.scores[places], self.class_indices[places]
        return type(self)(self.image, *parts, self.categories)

    def draw(self) -> PilImage.Image:
        """Draw the boxes with class names and scores on a copy of the image."""
        colours = class_colours([category.name for category in self.categories])
        names = self.class_names
        return PilImage.fromarray(draw_boxes(self.image, self.boxes_xywh, names, scores=self.scores, colours=colours))

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return COCO results: `image_id`, `category_id` of the source, `bbox` [x, y, width, height] and `score`."""
        return [
            {"image_id": image_id, "category_id": self.categories[index].id, "bbox": box, "score": score}
            for index, box, score in zip(
                self.class_indices, self.boxes_xywh.tolist(), self.scores.tolist(), strict=True
            )
        ]

    def to_arrow(self) -> pa.Table:
        """Return a row for each detection: `bbox` as in `boxes_xywh`, `score`, `category` (index) and `class_name`."""
        flat = pa.array(self.boxes_xywh.reshape(-1), pa.float64())
        return pa.table(
            {
                "bbox": pa.FixedSizeListArray.from_arrays(flat, 4),
                "score": self.scores,
                "category": self.class_indices,
                "class_name": pa.array(self.class_names, pa.string()),
            }
        )

    def to_supervision(self) -> Any:
        """Return a `supervision.Detections`; needs the package supervision.

        Raises:
            ImportError: The package is not installed.
        """
        supervision: Any = importlib.import_module("supervision")
        return supervision.Detections(
            xyxy=xywh_to_xyxy(self.boxes_xywh).astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.class_indices,
            data={"class_name": np.array(self.class_names)},
        )
