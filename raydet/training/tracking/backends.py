"""Tracker backends: TensorBoard event files, MLflow, Weights & Biases. Any call may raise any exception."""

import io
import json
import netrc
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from raydet.tables import storage

RgbImage = npt.NDArray[np.uint8]


class Backend(Protocol):
    """Interface of a tracker. Any method may raise any exception."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag, after `step` optimizer steps."""

    def images(self, step: int, images: Mapping[str, RgbImage]) -> None:
        """Log images, uint8 RGB [H, W, 3], by tag."""

    def flush(self) -> None:
        """Send or write buffered data."""

    def close(self) -> None:
        """Mark the run as finished."""


class LogFolder:
    """OUT/log as a local folder: the folder itself, or a temporary copy that `publish` uploads to a URI."""

    def __init__(self, out: str) -> None:
        self.uri = storage.join(out, "log")
        self.is_remote = not storage.is_local(out)
        self.path = Path(tempfile.mkdtemp(prefix="raydet-log-") if self.is_remote else storage.resolve(self.uri)[1])
        self._sent: dict[Path, tuple[int, int]] = {}

    def fetch(self, name: str) -> Path:
        """Return a local subfolder with the files that an earlier process wrote."""
        folder = self.path / name
        if self.is_remote:
            storage.fetch_folder(storage.join(self.uri, name), str(folder))
        return folder

    def publish(self) -> None:
        """Upload the files that have changed since the last call."""
        if not self.is_remote:
            return
        for path in sorted(self.path.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            version = (status.st_size, status.st_mtime_ns)
            if self._sent.get(path) != version:
                name = path.relative_to(self.path).as_posix()
                storage.write_bytes(storage.join(self.uri, name), path.read_bytes())
                self._sent[path] = version

    def remove(self) -> None:
        """Delete the temporary copy."""
        if self.is_remote:
            shutil.rmtree(self.path, ignore_errors=True)


class TensorBoard:
    """One TensorBoard event file, written incrementally."""

    def __init__(self, folder: Path, config: dict[str, Any], start_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, and two processes may start in the same second.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._write(start_step + 1, session_log=SessionLog(status=SessionLog.START))
        lines = [f"    {name}: {json.dumps(value, default=str)}" for name, value in config.items()]
        self._write(start_step, summary=text("config", "\n".join(lines)))
        self.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag."""
        summary = self._summary
        numbers = [summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._write(step, summary=summary(value=numbers))

    def images(self, step: int, images: Mapping[str, RgbImage]) -> None:
        """Log images by tag."""
        summary = self._summary
        for tag, pixels in images.items():
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "JPEG", quality=90, subsampling=0)
            image = summary.Image(
                height=pixels.shape[0],
                width=pixels.shape[1],
                colorspace=3,
                encoded_image_string=encoded.getvalue(),
            )
            self._write(step, summary=summary(value=[summary.Value(tag=tag, image=image)]))

    def flush(self) -> None:
        """Write buffered data to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the run."""
        self._writer.close()


class MLflow:
    """A run at MLFLOW_TRACKING_URI, or in files in OUT/log/mlflow. Numbers are buffered until the next flush."""

    def __init__(
        self, folder: LogFolder, run_id: str | None, run_name: str, config: dict[str, Any], start_step: int
    ) -> None:
        # By default MLflow retries for minutes; an unreachable server must not delay the workers.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or _mlflow_files(folder))
        self._waiting: list[Metric] = []
        self.run_id = self._resumed(run_id) or self._started(run_name)
        self._log_config(config, start_step)

    def _resumed(self, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id

    def _started(self, run_name: str) -> str:
        experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if not experiment_id:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "raydet"
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        return str(self._client.create_run(experiment_id, run_name=run_name).info.run_id)

    def _log_config(self, config: dict[str, Any], start_step: int) -> None:
        """Log the config. MLflow parameters are immutable, so changed values, such as raised `epochs`, become tags."""
        from mlflow.entities import Param

        logged = self._client.get_run(self.run_id).data.params
        now = {
            name: (json.dumps(value) if isinstance(value, dict | list) else str(value))[:6000]
            for name, value in config.items()
        }
        new = [Param(name, value) for name, value in now.items() if name not in logged]
        if new:
            self._client.log_batch(self.run_id, params=new[:100])
        for name, value in now.items():
            if logged.get(name, value) != value:
                self._client.set_tag(self.run_id, f"{name} from step {start_step}", value)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag."""
        now_ms = int(time.time() * 1000)
        self._waiting += [self._metric(_mlflow_name(tag), float(value), now_ms, step) for tag, value in values.items()]
        del self._waiting[:-100_000]  # bounds the memory if the server stays unreachable

    def images(self, step: int, images: Mapping[str, RgbImage]) -> None:
        """Log images by tag."""
        for tag, image in images.items():
            key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", _mlflow_name(tag))
            self._client.log_image(self.run_id, image, key=key, step=step, synchronous=True)

    def flush(self) -> None:
        """Send buffered numbers; those that cannot be sent stay buffered."""
        while self._waiting:
            self._client.log_batch(self.run_id, metrics=self._waiting[:1000])
            del self._waiting[:1000]

    def close(self) -> None:
        """Close the run."""
        self._client.set_terminated(self.run_id)


def _mlflow_files(folder: LogFolder) -> str:
    """Return the URI of MLflow's file store: OUT/log/mlflow, or a local copy adapted to its new path."""
    path = folder.fetch("mlflow")
    if folder.is_remote:
        for meta in path.rglob("meta.yaml"):
            # Each meta.yaml contains the path of its folder.
            content = meta.read_text()
            meta.write_text(re.sub(r"file://\S*?/raydet-log-\w+/mlflow", path.as_uri(), content))
        for meta in path.glob("*/*/meta.yaml"):
            # Object stores do not keep empty folders, but MLflow does not recognise a run that lacks one of these.
            for name in ("artifacts", "metrics", "params", "tags"):
                (meta.parent / name).mkdir(exist_ok=True)
    return path.absolute().as_uri()


def _mlflow_name(tag: str) -> str:
    """Convert a tag to a valid MLflow name, which may contain only characters that are safe in file names."""
    parts = [re.sub(r"[^\w.\- ]", "_", part).strip() for part in tag.split("/")]
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


class WandB:
    """A Weights & Biases run. Without a key it is written to OUT/log/wandb, which `wandb sync` can upload later."""

    def __init__(
        self, folder: LogFolder, run_id: str | None, run_name: str, config: dict[str, Any], start_step: int
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._image, self._teardown = wandb.Image, wandb.teardown
        self.run_id = run_id or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
        folder.path.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE") or (None if _has_wandb_key() else "offline")
        self._is_offline = mode == "offline"
        self._run = wandb.init(
            id=self.run_id,
            resume="allow" if mode in (None, "online", "shared") else None,
            project=os.environ.get("WANDB_PROJECT") or "raydet",
            name=os.environ.get("WANDB_NAME") or run_name,
            dir=os.environ.get("WANDB_DIR") or str(folder.path),
            config=config,
            allow_val_change=True,
            mode=mode,
            # W&B would upload the command line and the console output, which may contain passwords.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                init_timeout=60,
                finish_timeout=60,
            ),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag."""
        self._log(step, dict(values))

    def images(self, step: int, images: Mapping[str, RgbImage]) -> None:
        """Log images by tag."""
        self._log(step, {tag: self._image(image) for tag, image in images.items()})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        # W&B steps only increase, so repeated steps keep their first numbers.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def flush(self) -> None:
        """Do nothing: W&B sends data automatically."""

    def close(self) -> None:
        """Close the run."""
        self._run.finish()
        if self._is_offline:
            # W&B writes in a separate process, which may still be writing the last lines when `finish` returns.
            self._teardown()


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
