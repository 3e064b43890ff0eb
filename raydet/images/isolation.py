"""Decoding in a process of its own, whose memory and CPU time the system limits.

Decoders are C libraries that believe what a file states. For files that may not be what they state, `decode` asks a
small interpreter that has nothing but Pillow and numpy, and none of this process's environment. It is started when
first needed, serves one image at a time, and ends with this process or with the image that exceeds its limits.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from raydet.common.threads import available_cpus

_CPU_S, _BYTES_PER_CPU_S = 5, 50_000_000
_SPARE_BYTES = 512 * 2**20
"""Address space beside what an image needs: the file, the decoder's tables."""
_LONGEST_HEADER = 64 * 2**10
_WALL_FACTOR, _WALL_S = 4, 60
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "SYSTEMROOT")
_PROGRAM = "from raydet.images import decode, isolation; isolation.serve(decode)"
_TOO_SLOW = "decoding it takes too long"
_CRASHED = "the decoder crashed"


class IsolationError(Exception):
    """The image exceeded the limits, or crashed the decoder; the message is one short reason."""


class _Worker:
    """An interpreter that decodes one image after another."""

    def __init__(self) -> None:
        folders = [str(Path(__file__).parents[2]), *(path for path in sys.path if Path(path).is_absolute())]
        variables = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        variables |= {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=variables,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for this process
        )

    def ask(self, question: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Send an image and return the answer; after an exception the worker has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(_WALL_S + _WALL_FACTOR * _cpu_s(10 * question["max_pixels"]), self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.write(data)
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline(_LONGEST_HEADER))
            num_bytes = int(answer["num_bytes"])
            if not 0 <= num_bytes <= len(data) + 4 * question["max_pixels"] + _LONGEST_HEADER:
                raise ValueError
            content = self._process.stdout.read(num_bytes)
            if len(content) != num_bytes:
                raise EOFError
            return answer, content
        except (OSError, ValueError, EOFError, KeyError):
            self.end()
            is_slow = self._process.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
            raise IsolationError(_TOO_SLOW if is_slow else _CRASHED) from None
        except BaseException:
            self.end()
            raise
        finally:
            timer.cancel()

    def end(self) -> None:
        """End the process, by the end of its input if it waits for an image."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_idle: list[_Worker] = []
_slots = threading.BoundedSemaphore(available_cpus())


def run(
    operation: str, data: bytes, max_pixels: int, at_least_hw: tuple[int, int] | None
) -> tuple[dict[str, Any], bytes]:
    """Apply an operation of `decode` to an image file, as many at a time as there are CPUs.

    Returns:
        The answer, with `error` or the result, and the bytes of the result.

    Raises:
        IsolationError: The image exceeds the limits, or crashes the decoder.
    """
    question = {
        "operation": operation,
        "max_pixels": max_pixels,
        "at_least_hw": at_least_hw,
        "num_bytes": len(data),
    }
    with _slots:
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker()
        answer = worker.ask(question, data)
        _idle.append(worker)
        return answer


@atexit.register
def _end_all() -> None:
    while _idle:
        _idle.pop().end()


def _forget() -> None:
    """Leave the workers to the process that this one was forked from."""
    global _slots
    _idle.clear()
    _slots = threading.BoundedSemaphore(available_cpus())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _cpu_s(needed_bytes: int) -> int:
    return _CPU_S + min(needed_bytes, 2**32) // _BYTES_PER_CPU_S


def serve(decode: Any) -> None:
    """Answer questions on stdin until it ends; the program of a worker.

    Args:
        decode: The module `raydet.images.decode`, which imports this one.
    """
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    while line := source.readline(_LONGEST_HEADER):
        question = json.loads(line)
        data = source.read(question["num_bytes"])
        _limit(_SPARE_BYTES)
        answer, content = _answer(decode, question, data)
        _lift()
        _send(target, {**answer, "num_bytes": len(content)}, content)


def _answer(decode: Any, question: dict[str, Any], data: bytes) -> tuple[dict[str, Any], Any]:
    try:
        at_least_hw = question["at_least_hw"] and tuple(question["at_least_hw"])
        result = decode.run_here(question["operation"], data, question["max_pixels"], at_least_hw, _limit)
    except decode.DecodeError as error:
        return {"error": str(error), "is_truncated": isinstance(error, decode.TruncatedError)}, b""
    if question["operation"] == "decode":
        return {"size_hw": result.shape[:2]}, memoryview(result).cast("B")
    if question["operation"] == "repair":
        return {}, result
    return ({"value": result} if question["operation"] == "orientation" else {"size_hw": result}), b""


def _send(target: IO[bytes], answer: dict[str, Any], content: bytes | memoryview) -> None:
    target.write(json.dumps(answer).encode() + b"\n")
    target.write(content)
    target.flush()


def _limit(needed_bytes: int) -> None:
    """Limit the memory and CPU time of this process to what one more image needs."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_soft(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + _cpu_s(needed_bytes))
    with contextlib.suppress(OSError):  # there is no `/proc` on other systems, nor this limit
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        _set_soft(resource.RLIMIT_AS, pages * resource.getpagesize() + needed_bytes + _SPARE_BYTES)


def _lift() -> None:
    import resource

    _set_soft(resource.RLIMIT_AS, resource.RLIM_INFINITY)


def _set_soft(kind: int, value: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
