"""Where a training run can be watched: TensorBoard always, MLflow and Weights & Biases on request.

Imports no Ray, and each tracker's own package only when a run starts. Steps are counted as optimizer steps done, so
that a run which goes on after step 100 does all that was logged above 100 again.
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
from raydet.training.tracking.backends import Backend, LogFolder, MLflow, Picture, TensorBoard, WandB

__all__ = ["RunTracker", "check_trackers", "scalars_of", "without_secrets"]

_PACKAGES: dict[str, str] = {"mlflow": "mlflow", "wandb": "wandb"}
_FLUSH_EVERY_S = 60.0
_RETRY_AFTER_S = 300.0
_STATE_FILE = "trackers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Makes sure, without importing them, that the packages of the trackers are there.

    Raises:
        UserError: A tracker is unknown or not installed.
    """
    unknown = [name for name in names if name not in _PACKAGES]
    if unknown:
        raise UserError(f"trackers: {', '.join(unknown)} is not known; there are {', '.join(_PACKAGES)}")
    missing = [name for name in dict.fromkeys(names) if not _is_installed(_PACKAGES[name])]
    if missing:
        raise UserError(
            f"trackers: {' and '.join(missing)} not installed; install with: pip install 'raydet[{','.join(missing)}]'"
        )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of that name, such as the one W&B leaves where it runs, is found as well, but without an origin.
    return spec is not None and spec.origin is not None


def scalars_of(record: EpochRecord) -> dict[str, float]:
    """Turns the record of an epoch into tags and numbers, in the groups that TensorBoard shows.

    Args:
        record: Its undefined numbers are left out.

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
    name = name.replace("/", "_")  # a slash would open a further group
    if group == "losses":
        return f"train/{name}"
    if group.endswith("_s"):
        return f"time/{group.removesuffix('_s')}_{name}_s"
    return f"{group}/{name}"


class RunTracker:
    """Logs a run to TensorBoard's event files in OUT/log/tensorboard and to the trackers that are asked for.

    It belongs to one process, the one of rank 0. A tracker that fails is told of once and tried again some minutes
    later; training never ends for it. What is logged of the config holds no passwords, keys or tokens.
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
        """Starts the trackers, or takes up the runs that were logged to before.

        Args:
            out: The run's folder or URI. What trackers write for a URI is kept in a temporary folder, and copied to
                the URI by `flush`.
            trackers: Besides TensorBoard.
            config: The resolved config of the run.
            start_step: Optimizer steps already done. What an earlier process logged of later steps is hidden.
            warn: Called with one line when a tracker fails for the first time; by default it is logged.
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
        """Logs numbers under their tags; now and then it flushes.

        Args:
            step: Optimizer steps done.
            values: By tag, as `GROUP/NAME`.
        """
        for name, backend in self._backends.items():
            self._guarded(name, lambda backend=backend: backend.scalars(step, values))  # type: ignore[misc]
        if time.monotonic() - self._flushed_at > _FLUSH_EVERY_S:
            self.flush()

    def images(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Logs pictures, uint8 RGB [H, W, 3], under their tags."""
        for name, backend in self._backends.items():
            # MLflow keeps pictures elsewhere than numbers: where one place fails, the other is still written to.
            place = f"{name} images"
            if not self._is_paused(place):
                self._guarded(place, lambda backend=backend: backend.images(step, pictures))  # type: ignore[misc]

    def flush(self) -> None:
        """Brings what was logged to where it can be seen."""
        for name, backend in self._backends.items():
            if not self._is_paused(name):
                self._guarded(name, backend.flush)
        if not self._is_paused("log"):
            self._guarded("log", self._folder.publish)
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flushes and ends the trackers' runs."""
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
        except Exception as error:  # whatever a tracker or its server does wrong
            self._retry_at[name] = time.monotonic() + _RETRY_AFTER_S
            if name not in self._warned:
                self._warned.add(name)
                reason = without_secrets(one_line(f"{type(error).__name__}: {error}"))
                self._warn(f"{name} cannot be written, training goes on: {reason[:400]}")


def _read_state(uri: str) -> dict[str, str]:
    if not storage.exists(uri):
        return {}
    state: dict[str, str] = json.loads(storage.read_bytes(uri))
    return state
