"""An evaluated run and crops tables → counts and precision of every answer, and the answers about drawn boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raydet.common.errors import shortened
from raydet.measuring.answers.columns import Answers, read_answers
from raydet.measuring.detections import Scored
from raydet.measuring.diagnosis.scores import IOU, Outcomes, outcomes_at
from raydet.measuring.numbers.matches import Protocol
from raydet.measuring.numbers.matching import match
from raydet.measuring.truth import read_truth
from raydet.reporting.judging import JudgedImage, read_scored, score_threshold
from raydet.reporting.run_tables import RunTables
from raydet.tables.columns import Integers, image_places, keep_detections

_MOST_ROWS = 30
_MOST_CLASSES = 3
_LONGEST_ON_PICTURE = 30


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """An answer, or all that have none, among the detections from the score threshold on.

    Attributes:
        text: Answer; "no answer" for the rest.
        num_detections: Detections that count: those inside crowds do not.
        num_correct: Those that find a labelled object of their class at IoU 0.5.
        classes: Most frequent classes of the detections, with their numbers.
    """

    text: str
    num_detections: int
    num_correct: int
    classes: str

    @property
    def precision(self) -> float | None:
        """Share of correct detections; None without any."""
        return self.num_correct / self.num_detections if self.num_detections else None


@dataclass(frozen=True, kw_only=True)
class AnswerTable:
    """Answers to one question, the most frequent first, ranges ascending; `num_left_out` rarer ones are not listed."""

    title: str
    rows: tuple[AnswerRow, ...]
    num_left_out: int


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Answers about the detections of a run.

    Attributes:
        tables: One for each column of answers.
        scored: The detections.
        columns: Their answers.
    """

    tables: tuple[AnswerTable, ...]
    scored: Scored
    columns: tuple[Answers, ...]

    def beside(self, judged: Mapping[int, JudgedImage]) -> dict[int, JudgedImage]:
        """Return judged images with the answers beside the names of their detections, by image id as before."""
        return {image_id: self._beside(image_id, image) for image_id, image in judged.items()}

    def _beside(self, image_id: int, image: JudgedImage) -> JudgedImage:
        place = int(np.searchsorted(self.scored.truth_columns.image_ids, image_id))
        if place == len(self.scored.found_ids) or self.scored.truth_columns.image_ids[place] != image_id:
            return image
        found = self.scored.columns
        rows = range(int(found.starts[place]), int(found.starts[place + 1]))
        texts = {
            tuple(box): [text for answers in self.columns if (text := answers.text_of(row)) is not None]
            for row, box in zip(rows, found.boxes_xywh[rows.start : rows.stop].tolist(), strict=True)
        }

        def named(box: Sequence[float], name: str) -> str:
            own = (shortened(text, _LONGEST_ON_PICTURE) for text in texts.get(tuple(box), []))
            return " · ".join([name, *own])

        return replace(image, detections=[(box, named(box, name)) for box, name in image.detections])


def read_answered(run: RunTables, uris: Sequence[str]) -> Answered:
    """Read the answers of crops tables about the detections of a run, and judge these as the galleries do.

    Raises:
        UserError: The truth or the detections no longer exist or are not tables, or `read_answers` raises.
    """
    truth = read_truth(run.truth.uri)
    scored = read_scored(run, truth)
    found = scored.columns
    columns = read_answers(uris, scored.found_ids[image_places(found)], found.boxes_xywh)
    rows = np.flatnonzero(found.scores >= score_threshold(run))
    is_kept = np.zeros(len(found.scores), np.bool_)
    is_kept[rows] = True
    protocol = Protocol(iou_thresholds=(IOU,), class_agnostic=bool(run.settings.get("class_agnostic")))
    num_categories = 1 if protocol.class_agnostic else len(truth.categories)
    outcomes = outcomes_at(match(scored.truth_columns, keep_detections(found, is_kept), num_categories, protocol))
    names = [category.name for category in truth.categories]
    counted = rows[outcomes.detection_row]
    tables = tuple(_table(answers, counted, outcomes, found.category[counted], names) for answers in columns)
    return Answered(tables=tables, scored=scored, columns=tuple(columns))


def _table(
    answers: Answers, rows: Integers, outcomes: Outcomes, category: Integers, names: Sequence[str]
) -> AnswerTable:
    """Return the counts of a column of answers; `rows` and `category` are those of the detections that count."""
    num_values = len(answers.values)
    codes = np.where(answers.codes[rows] < 0, num_values, answers.codes[rows])
    counts = np.bincount(codes, minlength=num_values + 1)
    correct = np.bincount(codes[outcomes.is_right], minlength=num_values + 1)
    order = np.argsort(np.zeros(num_values) if answers.are_numbers else -counts[:num_values], kind="stable")
    order = order[counts[order] > 0]
    listed = [*order[:_MOST_ROWS].tolist(), *([num_values] if counts[num_values] else [])]
    return AnswerTable(
        title=answers.title,
        rows=tuple(
            AnswerRow(
                text=answers.text(code, None) or "" if code < num_values else "no answer",
                num_detections=int(counts[code]),
                num_correct=int(correct[code]),
                classes=_most_frequent(category[codes == code], names),
            )
            for code in listed
        ),
        num_left_out=max(0, len(order) - _MOST_ROWS),
    )


def _most_frequent(category: Integers, names: Sequence[str]) -> str:
    counts = np.bincount(category, minlength=len(names))
    best = [index for index in np.argsort(-counts, kind="stable")[: _MOST_CLASSES + 1].tolist() if counts[index]]
    more = ["…"] if len(best) > _MOST_CLASSES else []
    return ", ".join([*(f"{names[index]} {counts[index]:,}" for index in best[:_MOST_CLASSES]), *more])
