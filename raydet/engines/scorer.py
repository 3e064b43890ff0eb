"""Images → detections through an engine: cut into views, batched, detected, merged and selected.

The work has two halves, `prepare` on the CPU and `predict` on the model's device, so that a worker can prepare the next
images while the model runs.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from raydet.config import PredictConfig
from raydet.engines.selection import at_operating_point, check_classes, select
from raydet.engines.tiling import merge
from raydet.engines.views import TileView, crop, planned_views
from raydet.models.detector import Detections
from raydet.models.geometry import Image, SizeHW

if TYPE_CHECKING:
    from raydet.engines.engine import Engine
    from raydet.measuring.fitting.operating_point import FittedPoint

_BATCHES_AT_ONCE = 2
"""Maximum number of prepared batches, and of batches that the device has not finished."""


class _Job(NamedTuple):
    """One view of one image, by index."""

    image: int
    view: int


@dataclass(frozen=True)
class PreparedImages:
    """Images prepared by a `Scorer`, for a single call of `predict`.

    Attributes:
        sizes_hw: Height and width of each image in pixels.
        batches: Jobs of each batch, and their pixels as the engine prepared them; the first ones are ready, the others
            are prepared on demand.
    """

    sizes_hw: list[SizeHW]
    views: list[list[TileView]]
    batches: Iterator[tuple[list[_Job], Any]]


class _Branch(NamedTuple):
    """An engine, and the indices of its classes to keep; None for all."""

    engine: "Engine"
    classes: tuple[int, ...] | None


class Scorer:
    """Object detection as a `PredictConfig` describes it: tiles, mirrored views, merging, selection.

    `batch_size` is the maximum number of views per batch of the engine, `point` the operating point to apply, `others`
    further engines that take the images that `engine` has prepared, for `predict_each`.

    Raises:
        UserError: `config.classes` names a class that an engine does not know.
    """

    def __init__(
        self,
        engine: "Engine",
        config: PredictConfig,
        *,
        batch_size: int,
        point: "FittedPoint | None" = None,
        others: "Sequence[Engine]" = (),
    ) -> None:
        self._engine = engine
        self._point = point
        self._config = config
        self._batch_size = batch_size
        self._branches = [_Branch(each, check_classes(config.classes, each.categories)) for each in (engine, *others)]

    def prepare(self, images: Sequence[Image]) -> PreparedImages:
        """Plan the views of images and prepare the first batches for the model.

        May run in a different thread from `predict`. Without tiles this is usually all of the CPU's work. Tiles make
        many batches, most of which are prepared during `predict`. The images, RGB uint8 [H, W, 3], are kept in memory
        until then.
        """
        sizes_hw = [(image.shape[0], image.shape[1]) for image in images]
        views = [planned_views(size_hw, self._config) for size_hw in sizes_hw]

        def prepare(jobs: Sequence[_Job]) -> Any:
            return self._engine.prepare([crop(images[job.image], views[job.image][job.view]) for job in jobs])

        return self._prepare(sizes_hw, views, prepare)

    def prepare_resized(self, sizes_hw: Sequence[SizeHW], planes: Sequence[Sequence[Image]]) -> PreparedImages:
        """Prepare images whose views are cut and resized already.

        `planes` holds the views of each image in the order of `planned_views`, each resized by the engine's
        `resize_rule`, uint8 [3, height, width]; they are kept in memory until `predict` returns.
        """
        views = [planned_views(size_hw, self._config) for size_hw in sizes_hw]

        def prepare(jobs: Sequence[_Job]) -> Any:
            return self._engine.prepare_planes(
                [planes[job.image][job.view] for job in jobs], [views[job.image][job.view].size_hw for job in jobs]
            )

        return self._prepare(sizes_hw, views, prepare)

    def _prepare(
        self, sizes_hw: Sequence[SizeHW], views: list[list[TileView]], prepare: Callable[[Sequence[_Job]], Any]
    ) -> PreparedImages:
        jobs = [_Job(image, view) for image, planned in enumerate(views) for view in range(len(planned))]
        if self._config.pad_batches and len(jobs) > self._batch_size:
            # Views of similar size share a batch, which keeps the padding small.
            jobs.sort(key=lambda job: self._engine.input_size_hw(views[job.image][job.view].size_hw))
        parts = (jobs[start : start + self._batch_size] for start in range(0, len(jobs), self._batch_size))
        batches = ((part, prepare(part)) for part in parts)
        return PreparedImages(list(sizes_hw), views, chain(list(islice(batches, _BATCHES_AT_ONCE)), batches))

    def predict(self, prepared: PreparedImages) -> list[Detections]:
        """Run the model on prepared images, while a thread prepares the next batch.

        On a device that works asynchronously, a batch starts before the results of the previous one are fetched.

        Returns:
            The requested detections of each image, in order; those of an image are in descending score order, in pixels
            of the image.
        """
        return self.predict_each(prepared)[0]

    def predict_each(self, prepared: PreparedImages) -> list[list[Detections]]:
        """Run each engine on prepared images, batch by batch; the result has one list as of `predict` for each."""
        found: list[list[dict[int, Detections]]] = [[{} for _ in prepared.sizes_hw] for _ in self._branches]
        started: deque[tuple[list[_Job], list[Callable[[], list[Detections]]]]] = deque()

        def fetch() -> None:
            jobs, of_each = started.popleft()
            for images, answers in zip(found, of_each, strict=True):
                for job, answer in zip(jobs, answers(), strict=True):
                    images[job.image][job.view] = answer

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare") as thread:
            upcoming = thread.submit(next, prepared.batches, None)
            while (batch := upcoming.result()) is not None:
                upcoming = thread.submit(next, prepared.batches, None)
                started.append((batch[0], [branch.engine.start(batch[1]) for branch in self._branches]))
                if len(started) == _BATCHES_AT_ONCE:
                    fetch()
        while started:
            fetch()
        return [
            [
                self._finish(branch, views, [of_view[number] for number in range(len(views))], size_hw)
                for views, of_view, size_hw in zip(prepared.views, images, prepared.sizes_hw, strict=True)
            ]
            for branch, images in zip(self._branches, found, strict=True)
        ]

    def _finish(
        self, branch: "_Branch", views: Sequence[TileView], found: Sequence[Detections], size_hw: SizeHW
    ) -> Detections:
        """Merge the detections of an image's views and drop those that were not requested."""
        if branch.classes is not None:  # Before the merge, which uses only the best boxes of each view.
            found = [select(one, categories=branch.classes) for one in found]
        most = max(branch.engine.max_detections, self._config.top_k or 0)
        kept = merged_and_selected(views, found, size_hw, self._config, max_detections=most, point=self._point)
        return kept.with_used_queries()


def merged_and_selected(
    views: Sequence[TileView],
    found: Sequence[Detections],
    size_hw: SizeHW,
    config: PredictConfig,
    *,
    max_detections: int,
    point: "FittedPoint | None",
) -> Detections:
    """Merge the detections of an image's views as `tiling.merge` does, and keep those that the config requests.

    Those of other classes than the requested ones must be gone already.
    """
    merged = merge(views, found, size_hw, how=config.merge, iou=config.merge_iou, max_detections=max_detections)
    if point is not None:
        return select(
            at_operating_point(merged, point), top_k=config.top_k, class_agnostic_nms=point.class_agnostic_nms
        )
    return select(
        merged,
        score_threshold=config.score_threshold or 0.0,
        top_k=config.top_k,
        class_agnostic_nms=config.class_agnostic_nms,
    )
