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


class Interpreter:
    """A small interpreter with none of this process's environment, which answers on its standard output.

    Attributes:
        to_it: Its standard input.
        from_it: Its standard output.
    """

    def __init__(self, program: str) -> None:
        folders = [str(Path(__file__).parents[2]), *(path for path in sys.path if Path(path).is_absolute())]
        variables = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        variables |= {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=variables,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for this process
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.to_it, self.from_it = self._process.stdin, self._process.stdout

    def read_header(self) -> dict[str, Any]:
        """Read the header of its next answer.

        Raises:
            ValueError: There is none, or it is no JSON object.
        """
        header = json.loads(self.from_it.readline(_LONGEST_HEADER))
        if not isinstance(header, dict):
            raise ValueError("not an object")
        return header

    def read_content(self, num_bytes: int) -> bytes:
        """Read the content of its answer.

        Raises:
            EOFError: It ended before.
        """
        content = self.from_it.read(num_bytes)
        if len(content) != num_bytes:
            raise EOFError
        return content

    def end(self) -> None:
        """End the process, by the end of its input if it waits for a question."""
        for stream in (self.to_it, self.from_it):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def failure(self) -> IsolationError:
        """End the process, and return the reason why it did not answer."""
        self.end()
        is_slow = self._process.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
        return IsolationError(_TOO_SLOW if is_slow else _CRASHED)


class _Worker(Interpreter):
    """An interpreter that decodes one image after another."""

    def __init__(self) -> None:
        super().__init__(_PROGRAM)

    def ask(self, question: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Send an image and return the answer; after an exception the worker has ended."""
        timer = threading.Timer(_WALL_S + _WALL_FACTOR * _cpu_s(10 * question["max_pixels"]), self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            self.to_it.write(json.dumps(question).encode() + b"\n")
            self.to_it.write(data)
            self.to_it.flush()
            answer = self.read_header()
            num_bytes = int(answer["num_bytes"])
            if not 0 <= num_bytes <= len(data) + 4 * question["max_pixels"] + _LONGEST_HEADER:
                raise ValueError
            return answer, self.read_content(num_bytes)
        except (OSError, ValueError, EOFError, KeyError):
            raise self.failure() from None
        except BaseException:
            self.end()
            raise
        finally:
            timer.cancel()


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
    source, target = own_streams()
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    while (question := read_question(source)) is not None:
        data = source.read(question["num_bytes"])
        _limit(_SPARE_BYTES)
        answer, content = _answer(decode, question, data)
        _lift()
        send(target, answer, content)


def own_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Return the streams of questions and answers, in an `Interpreter`; what libraries print is dropped."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return source, target


def read_question(source: IO[bytes]) -> dict[str, Any] | None:
    """Read the next question; None at the end."""
    line = source.readline(_LONGEST_HEADER)
    question: dict[str, Any] | None = json.loads(line) if line else None
    return question


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


def send(target: IO[bytes], answer: dict[str, Any], *content: bytes | memoryview) -> None:
    """Send an answer and its content, one part after the other."""
    num_bytes = sum(len(part) for part in content)
    target.write(json.dumps({**answer, "num_bytes": num_bytes}).encode() + b"\n")
    for part in content:
        target.write(part)
    target.flush()


def _limit(needed_bytes: int) -> None:
    """Limit the memory and CPU time of this process to what one more image needs."""
    limit_cpu(needed_bytes)
    limit_memory(needed_bytes)


def limit_cpu(needed_bytes: int) -> None:
    """Limit the further CPU time of this process to what filling this much memory takes."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_soft(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + _cpu_s(needed_bytes))


def limit_memory(needed_bytes: int) -> None:
    """Limit the memory of this process to what it has and this much more."""
    import resource

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
