"""A command on a terminal of its own, as a person runs it: what it prints, Ctrl-C, and what is left of it."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil


class Terminal:
    """Runs `raydet WORDS` on a pseudo-terminal.

    Attributes:
        text: Printed so far.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.text = ""
        self._master, slave = pty.openpty()
        # A session of its own, whose terminal this is: Ctrl-C goes to all its processes in the foreground.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ON_TERMINAL, os.ttyname(slave), *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._started: list[psutil.Process] = []

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float = 200) -> None:
        """Waits, reading what is printed.

        Raises:
            AssertionError: The command has ended, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, f"it ended with {self._process.returncode}: {self.text}"
            assert time.monotonic() < deadline, f"waited in vain: {self.text}"
            self._read(0.02)

    def press_ctrl_c(self) -> None:
        """Sends what the key sends."""
        self._note_processes()
        os.write(self._master, b"\x03")

    def exit_code(self, *, timeout_s: float = 60) -> int:
        """Waits for the end and returns the exit code; ends the process when the time is over."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < deadline:
            self._note_processes()
            self._read(0.1)
        if self._process.poll() is None:
            self.close()
            raise AssertionError(f"it did not end within {timeout_s:.0f} s: {self.text}")
        self._read(0.2)
        return self._process.returncode

    def left_over(self, *, timeout_s: float = 20) -> list[str]:
        """Command lines of the processes it started that are still there after a while."""
        _, alive = psutil.wait_procs(self._started, timeout=timeout_s)
        return [" ".join(process.cmdline()) for process in alive if process.is_running()]

    def close(self) -> None:
        """Ends whatever is left."""
        self._note_processes()
        for process in self._started:
            if process.is_running():
                process.kill()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)

    def _note_processes(self) -> None:
        try:
            children = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self._started += [child for child in children if child not in self._started]

    def _read(self, timeout_s: float) -> None:
        ready, _, _ = select.select([self._master], [], [], timeout_s)
        if ready:
            try:
                self.text += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                time.sleep(timeout_s)


_ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.tcsetpgrp(0, os.getpgrp())
os.execv(sys.executable, [sys.executable, "-m", "raydet", *sys.argv[2:]])
"""
