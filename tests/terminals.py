"""Pseudo-terminals: a command on one, as a user runs it, and what a terminal shows after some output."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil


class Terminal:
    """A `raydet WORDS` process on a pseudo-terminal.

    Attributes:
        text: Output so far.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.text = ""
        self._master, slave = pty.openpty()
        # A separate session with this terminal, so that Ctrl-C reaches all its foreground processes.
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
        """Wait for a condition while reading the output.

        Raises:
            AssertionError: The command ended, or the timeout expired.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, f"the command exited with {self._process.returncode}: {self.text}"
            assert time.monotonic() < deadline, f"timeout after {timeout_s:.0f} s: {self.text}"
            self._read(0.02)

    def press_ctrl_c(self) -> None:
        """Send the character of Ctrl-C."""
        self._note_processes()
        os.write(self._master, b"\x03")

    def exit_code(self, *, timeout_s: float = 60) -> int:
        """Wait for the command to exit and return its exit code; kill it after a timeout."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < deadline:
            self._note_processes()
            self._read(0.1)
        if self._process.poll() is None:
            self.close()
            raise AssertionError(f"the command did not exit within {timeout_s:.0f} s: {self.text}")
        self._read(0.2)
        return self._process.returncode

    def left_over(self, *, timeout_s: float = 20) -> list[str]:
        """Return the command lines of the started processes that still run after a timeout."""
        _, alive = psutil.wait_procs(self._started, timeout=timeout_s)
        return [" ".join(process.cmdline()) for process in alive if process.is_running()]

    def close(self) -> None:
        """Kill all remaining processes."""
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


_TOKEN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")


def shown_after(output: str) -> list[str]:
    """Return the lines that a terminal shows after some output, without colours and blanks at the ends.

    It follows carriage returns, line feeds, and the codes that move the cursor up or erase a line.
    """
    lines, row, column = [""], 0, 0
    for token in _TOKEN.findall(output):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b") and token[-1] == "A":
            row -= int(token[2:-1] or 1)
        elif token.startswith("\x1b") and token[-1] == "K":
            lines[row] = "" if token[2:-1] == "2" else lines[row][:column]
        elif not token.startswith("\x1b"):
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]


_ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.tcsetpgrp(0, os.getpgrp())
os.execv(sys.executable, [sys.executable, "-m", "raydet", *sys.argv[2:]])
"""
