"""Trackers of a training run: TensorBoard always, the reporting integrations of transformers on request.

Steps are completed optimizer steps, so that a run that resumes after step 100 repeats everything logged above 100.
This module does not import Ray, and imports a tracker's package only when a run starts.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from raydet.common.errors import one_line
from raydet.common.redaction import without_secrets
from raydet.config import COCO_METRICS
from raydet.tables import storage
from raydet.training.history import EpochRecord
from raydet.training.tracking.integrations import Arguments, Integration
from raydet.training.tracking.tensorboard import LogFolder, RgbImage, TensorBoard

_FLUSH_EVERY_S = 60.0
_RETRY_AFTER_S = 300.0


def scalars_of(record: EpochRecord) -> dict[str, float]:
    """Convert an epoch record to numbers by tag, grouped as TensorBoard shows them.

    Args:
        record: Epoch record; undefined numbers are omitted.

    Returns:
        Numbers under `train/…`, `validation/…`, `time/…`, and `GROUP/…` for other mappings, such as `AP_by_class/…`.
    """
    found: dict[str, float] = {}
    for name, value in record.to_json().items():
        if isinstance(value, Mapping):
            tags = {_tag_in(name, str(key)): number for key, number in value.items()}
        else:
            tags = {_tag(name): value}
        found |= {tag: float(number) for tag, number in tags.items() if _is_number(number)}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _tag(name: str) -> str:
    if name.endswith("_s") or name == "seconds":
        return f"time/{name}"
    if name in COCO_METRICS or name.startswith("validation_"):
        return f"validation/{name.removeprefix('validation_')}"
    return f"train/{name}"


def _tag_in(group: str, name: str) -> str:
    name = name.replace("/", "_")  # a slash would start another group
    if group == "losses":
        return f"train/{name}"
    if group.endswith("_s"):
        return f"time/{group.removesuffix('_s')}_{name}_s"
    return f"{group}/{name}"


class RunTracker:
    """Logger of a run to TensorBoard event files in OUT/log/tensorboard and to the requested trackers.

    Only rank 0 has one. If a tracker fails, a warning is shown once and the tracker is left out for a few minutes; a
    tracker that does not start is left out altogether. A failure never stops training. Passwords, keys and tokens are
    removed from the logged config.
    """

    def __init__(
        self,
        out: str,
        trackers: Sequence[str],
        config: dict[str, Any],
        *,
        start_step: int,
        steps_per_epoch: int,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Start the trackers, or resume the tracker runs of an earlier process.

        Args:
            out: Folder or URI of the run. For a URI, trackers write to a temporary folder, which `flush` uploads.
            trackers: Trackers in addition to TensorBoard, by name or as `MODULE:CLASS`.
            config: The resolved config of the run.
            start_step: Completed optimizer steps. TensorBoard hides later steps that an earlier process logged.
            steps_per_epoch: Optimizer steps in an epoch.
            warn: Called with one line when a tracker fails for the first time; by default the line is logged.
        """
        self._warn = warn or logging.getLogger(__name__).warning
        self._warned: set[str] = set()
        self._retry_at: dict[str, float] = {}
        self._flushed_at = time.monotonic()
        self._backends: dict[str, TensorBoard | Integration] = {}
        self._folder = LogFolder(out)
        public_config: dict[str, Any] = without_secrets(config)
        run_name = without_secrets(out).rstrip("/").rsplit("/", 1)[-1]
        arguments = Arguments(public_config, str(self._folder.path), run_name)
        state_uri = storage.join(out, "log", "trackers.json")
        ids: dict[str, str] = {"id": uuid.uuid4().hex}

        def resume() -> None:
            if trackers and storage.exists(state_uri):
                ids.update(json.loads(storage.read_bytes(state_uri)))
                self._folder.fetch("mlflow", "trackio")

        def start(name: str) -> None:
            if name == "tensorboard":
                self._backends[name] = TensorBoard(self._folder.path / name, public_config, start_step)
                return
            self._backends[name] = Integration(
                name, arguments, ids=ids, start_step=start_step, steps_per_epoch=steps_per_epoch
            )
            storage.write_bytes(state_uri, json.dumps(ids, indent=1).encode())

        self._guarded("log", resume)
        for name in ("tensorboard", *dict.fromkeys(trackers)):
            self._guarded(name, lambda name=name: start(name))  # type: ignore[misc]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag, and flush from time to time.

        Args:
            step: Completed optimizer steps.
            values: Numbers by tag, as `GROUP/NAME`.
        """
        self._each(lambda backend: backend.scalars(step, values))
        if time.monotonic() - self._flushed_at > _FLUSH_EVERY_S:
            self.flush()

    def images(self, step: int, images: Mapping[str, RgbImage]) -> None:
        """Log images, uint8 RGB [H, W, 3], by tag: to TensorBoard, W&B, Trackio and SwanLab."""
        self._each(lambda backend: backend.images(step, images))

    def flush(self) -> None:
        """Send or write buffered data."""
        self._each(lambda backend: backend.flush())
        self._guarded("log", self._folder.publish)
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush and close all trackers."""
        self._retry_at = {}
        self._each(lambda backend: backend.close())
        self._backends = {}
        self._guarded("log", self._folder.publish)
        self._folder.remove()

    def _each(self, call: Callable[[TensorBoard | Integration], None]) -> None:
        for name, backend in self._backends.items():
            self._guarded(name, lambda backend=backend: call(backend))  # type: ignore[misc]

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        if time.monotonic() < self._retry_at.get(name, 0.0):
            return
        try:
            call()
        except Exception as error:  # a tracker or its server may raise anything
            self._retry_at[name] = time.monotonic() + _RETRY_AFTER_S
            if name not in self._warned:
                self._warned.add(name)
                reason = without_secrets(one_line(f"{type(error).__name__}: {error}"))
                self._warn(f"cannot write to {name}; training continues: {reason[:400]}")
