"""Trackers of a training run: TensorBoard always, MLflow and Weights & Biases on request.

Steps are completed optimizer steps, so that a run that resumes after step 100 repeats everything logged above 100.
This module does not import Ray, and imports a tracker's package only when a run starts.
"""

import importlib.util
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from raydet.common.errors import UserError, one_line
from raydet.common.redaction import without_secrets
from raydet.config import COCO_METRICS, Tracker
from raydet.tables import storage
from raydet.training.history import EpochRecord
from raydet.training.tracking.backends import Backend, LogFolder, MLflow, RgbImage, TensorBoard, WandB

__all__ = ["RunTracker", "check_trackers", "scalars_of", "without_secrets"]

_PACKAGES: dict[str, str] = {"mlflow": "mlflow", "wandb": "wandb"}
_FLUSH_EVERY_S = 60.0
_RETRY_AFTER_S = 300.0
_STATE_FILE = "trackers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of the trackers are installed, without importing them.

    Raises:
        UserError: A tracker is unknown or not installed.
    """
    unknown = [name for name in names if name not in _PACKAGES]
    if unknown:
        raise UserError(f"--trackers does not support {', '.join(unknown)}; use {' or '.join(_PACKAGES)}")
    missing = [name for name in dict.fromkeys(names) if not _is_installed(_PACKAGES[name])]
    if missing:
        raise UserError(f"--trackers requires {' and '.join(missing)}; run: pip install 'raydet[{','.join(missing)}]'")


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A plain folder of that name, such as the one that W&B creates, is also found, but without an origin.
    return spec is not None and spec.origin is not None


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

    Only rank 0 has one. If a tracker fails, a warning is shown once and the tracker is retried a few minutes later; a
    tracker failure never stops training. Passwords, keys and tokens are removed from the logged config.
    """

    def __init__(
        self,
        out: str,
        trackers: Sequence[Tracker],
        config: dict[str, Any],
        *,
        start_step: int,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Start the trackers, or resume the tracker runs of an earlier process.

        Args:
            out: Folder or URI of the run. For a URI, trackers write to a temporary folder, which `flush` uploads.
            trackers: Trackers in addition to TensorBoard.
            config: The resolved config of the run.
            start_step: Completed optimizer steps. Later steps that an earlier process logged are hidden.
            warn: Called with one line when a tracker fails for the first time; by default the line is logged.
        """
        self._warn = warn or logging.getLogger(__name__).warning
        self._warned: set[str] = set()
        self._retry_at: dict[str, float] = {}
        self._flushed_at = time.monotonic()
        self._backends: dict[str, Backend] = {}
        self._folder = LogFolder(out)
        public_config: dict[str, Any] = without_secrets(config)
        state_uri = storage.join(out, "log", _STATE_FILE)
        run_ids: dict[str, str] = {}
        self._guarded(_STATE_FILE, lambda: run_ids.update(_read_state(state_uri)))
        run_name = without_secrets(out).rstrip("/").rsplit("/", 1)[-1]

        kinds: dict[str, type[MLflow] | type[WandB]] = {"mlflow": MLflow, "wandb": WandB}

        def start(name: str) -> None:
            if name == "tensorboard":
                self._backends[name] = TensorBoard(self._folder.path / "tensorboard", public_config, start_step)
                return
            backend = kinds[name](self._folder, run_ids.get(name), run_name, public_config, start_step)
            self._backends[name] = backend
            run_ids[name] = backend.run_id
            storage.write_bytes(state_uri, json.dumps(run_ids, indent=1).encode())

        for name in ("tensorboard", *dict.fromkeys(trackers)):
            self._guarded(name, lambda name=name: start(name))  # type: ignore[misc]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag, and flush from time to time.

        Args:
            step: Completed optimizer steps.
            values: Numbers by tag, as `GROUP/NAME`.
        """
        for name, backend in self._backends.items():
            self._guarded(name, lambda backend=backend: backend.scalars(step, values))  # type: ignore[misc]
        if time.monotonic() - self._flushed_at > _FLUSH_EVERY_S:
            self.flush()

    def images(self, step: int, images: Mapping[str, RgbImage]) -> None:
        """Log images, uint8 RGB [H, W, 3], by tag."""
        for name, backend in self._backends.items():
            # MLflow stores images and numbers separately: if one store fails, the other is still written.
            place = f"{name} images"
            if not self._is_paused(place):
                self._guarded(place, lambda backend=backend: backend.images(step, images))  # type: ignore[misc]

    def flush(self) -> None:
        """Send or write buffered data."""
        for name, backend in self._backends.items():
            if not self._is_paused(name):
                self._guarded(name, backend.flush)
        if not self._is_paused("log"):
            self._guarded("log", self._folder.publish)
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush and close all trackers."""
        for name, backend in self._backends.items():
            self._guarded(name, backend.flush)
            self._guarded(name, backend.close)
        self._backends = {}
        self._guarded("log", self._folder.publish)
        self._folder.remove()

    def _is_paused(self, name: str) -> bool:
        return time.monotonic() < self._retry_at.get(name, 0.0)

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a tracker or its server may raise anything
            self._retry_at[name] = time.monotonic() + _RETRY_AFTER_S
            if name not in self._warned:
                self._warned.add(name)
                reason = without_secrets(one_line(f"{type(error).__name__}: {error}"))
                self._warn(f"cannot write to {name}; training continues: {reason[:400]}")


def _read_state(uri: str) -> dict[str, str]:
    if not storage.exists(uri):
        return {}
    state: dict[str, str] = json.loads(storage.read_bytes(uri))
    return state
