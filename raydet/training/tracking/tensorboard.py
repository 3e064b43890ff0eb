"""The log folder and its TensorBoard event files. Any call may raise any exception."""

import io
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from raydet.tables import storage

RgbImage = npt.NDArray[np.uint8]


class LogFolder:
    """OUT/log as a local folder: the folder itself, or a temporary copy that `publish` uploads to a URI."""

    def __init__(self, out: str) -> None:
        self.uri = storage.join(out, "log")
        self.is_remote = not storage.is_local(out)
        self.path = Path(tempfile.mkdtemp(prefix="raydet-log-") if self.is_remote else storage.resolve(self.uri)[1])
        self._sent: dict[Path, tuple[int, int]] = {}

    def fetch(self, *names: str) -> None:
        """Download subfolders that an earlier process uploaded into the temporary copy."""
        for name in names if self.is_remote else ():
            storage.fetch_folder(storage.join(self.uri, name), str(self.path / name))

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
