"""Evaluation result → rows of its run in the metrics folder."""

import contextlib
import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from raydet.common.errors import UserError
from raydet.common.redaction import without_secrets
from raydet.common.version import __version__
from raydet.config import EvaluateConfig
from raydet.measuring import metrics_folder
from raydet.measuring.detections import Scored
from raydet.measuring.diagnosis.scores import IOU, outcomes_at, threshold_index
from raydet.measuring.diagnosis.tables import diagnose
from raydet.measuring.fitting.thresholds import point_values
from raydet.measuring.numbers.matches import Matches
from raydet.measuring.numbers.values import metric_rows
from raydet.measuring.result import Evaluation
from raydet.measuring.truth import Truth, data_hash
from raydet.models.checkpoints import fingerprint
from raydet.tables.output_folder import OutputFolder
from raydet.tables.schema import Category, TableKind, build_schema

ANY_CLASS = Category(1, "any")
"""Class used in the tables when all classes count as one."""
_COUNTS = ("num_images", "num_truth", "num_detections", "num_unreadable")


def write_tables(
    folder: OutputFolder,
    config: EvaluateConfig,
    truth: Truth,
    scored: Scored,
    matches: Matches,
    evaluation: Evaluation,
) -> None:
    """Write all tables of a run; LVIS gets no error analysis because its truth does not label every object."""
    assert config.run is not None
    model = without_secrets(config.model or scored.model)
    categories = (ANY_CLASS,) if config.class_agnostic else truth.categories
    names = {"run": config.run, "model": model, "split": config.split}
    values = [value for part in (evaluation.whole, *evaluation.slices) for block in part.blocks for value in block]
    tables: dict[TableKind, pa.Table] = {}
    counts = {name: getattr(evaluation.result, name) for name in _COUNTS}
    verification = evaluation.verification
    extra: dict[TableKind, dict[str, Any]] = {
        "metrics": {
            **counts,
            "num_left_out": scored.num_left_out,
            "num_other_class": scored.num_other_class,
            "verified": None if verification is None else not verification.differing,
            "verification": None if verification is None else verification.outcome,
        }
    }
    if config.protocol != "lvis":
        labelled, found = scored.truth_columns, scored.columns
        if config.class_agnostic:
            labelled = dataclasses.replace(labelled, category=np.zeros_like(labelled.category))
            found = dataclasses.replace(found, category=np.zeros_like(found.category))
        diagnosis = diagnose(
            labelled,
            found,
            matches,
            categories,
            run=config.run,
            target_precision=config.target_precision,
            unreadable=scored.errors,
            result=evaluation.result if config.protocol == "coco" else None,
        )
        tables |= diagnosis.tables
        values += diagnosis.values
        if scored.has_operating_point and threshold_index(matches.protocol, IOU) is not None:
            overall, *by_class = point_values(outcomes_at(matches), [category.name for category in categories])
            values += [value for block in (overall, *([] if config.class_agnostic else by_class)) for value in block]
        extra["per_image"] = {"iou": 0.5, "score_threshold": diagnosis.best.threshold}
    tables["runs"] = pa.Table.from_pylist([{**names, **counts, **_origin(config, scored)}], schema=build_schema("runs"))
    rows = metric_rows(values, run=config.run, model=model, split=config.split)
    tables["metrics"] = pa.Table.from_pylist(rows, schema=build_schema("metrics", categories))
    metrics_folder.write_run(folder, config, tables, extra=extra)


def _origin(config: EvaluateConfig, scored: Scored) -> dict[str, Any]:
    """Return the `runs` columns that record the inputs of a run."""
    checkpoint_hash = None
    if scored.model is not None:
        # The checkpoint may have been deleted or be unreachable from this machine.
        with contextlib.suppress(UserError, OSError):
            checkpoint_hash = fingerprint(scored.model)
    return {
        "truth": without_secrets(config.truth),
        "detections": without_secrets(config.detections),
        "checkpoint_hash": checkpoint_hash,
        "data_hash": data_hash(config.truth),
        "config": json.dumps(without_secrets(dataclasses.asdict(config))),
        "version": __version__,
        "time": datetime.now(UTC),
        "num_left_out": scored.num_left_out,
    }
