"""`doctor`: the state of this installation and machine, and what to do about what is missing or broken."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raydet.cli import checks
from raydet.cli.checks import Check
from raydet.common.console import Console, counted
from raydet.common.errors import one_line
from raydet.common.notebook.showing import Shown
from raydet.config import DoctorConfig
from raydet.config.fields import with_options

_GRACE_S = 5.0
"""Time for a check to notice its own time limit."""


@dataclass(frozen=True)
class Checkup(Shown):
    """Findings of the doctor, by subject."""

    findings: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """1 if something that commands need is broken, otherwise 0."""
        return int(any(finding.status == "broken" for finding in self.findings))

    def lines(self) -> list[str]:
        """Return one line for each finding, with the advice below it, and a summary."""
        width = max(len(finding.name) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.status:<6}  {finding.name:<{width}}  {finding.text}")
            if finding.advice:
                lines.append(f"{'':<{width + 10}}→ {finding.advice}")
        broken = [finding.name for finding in self.findings if finding.status == "broken"]
        summary = f"{counted(len(broken), 'problem')}: {', '.join(broken)}" if broken else "no problem found"
        return [*lines, "", summary]


@with_options(DoctorConfig)
def doctor(config: DoctorConfig, *, console: Console | None = None) -> Checkup:
    """Check this installation. The checks run at the same time, each with a time limit; no Ray is started."""
    limit = config.timeout_s
    subjects: dict[str, Callable[[], Iterator[Check]]] = {
        "Python": checks.check_python,
        "packages": checks.check_packages,
        "devices": lambda: checks.check_devices(limit),
        "Ray": lambda: checks.check_ray(config.ray_address, limit),
        "shared memory": checks.check_shared_memory,
        "disks": checks.check_disks,
        "Hub": lambda: checks.check_hub(limit),
        "extras": checks.check_extras,
    }
    running = [_Running(name, check) for name, check in subjects.items()]
    with (console or Console()).progress("checking"):
        deadline = time.monotonic() + limit + _GRACE_S
        for check in running:
            check.thread.join(max(0.0, deadline - time.monotonic()))
    return Checkup(tuple(finding for check in running for finding in check.findings(limit)))


class _Running:
    """A check in a thread of its own, which may hang, for instance on a dead network drive."""

    def __init__(self, name: str, check: Callable[[], Iterator[Check]]) -> None:
        self._name, self._check = name, check
        self._found: list[Check] = []
        self.thread = threading.Thread(target=self._run, daemon=True, name=f"doctor-{name}")
        self.thread.start()

    def _run(self) -> None:
        try:
            self._found += self._check()
        except Exception as error:
            text = f"the check failed: {type(error).__name__}: {one_line(error, limit=300)}"
            self._found.append(Check("broken", self._name, text, "please report this"))

    def findings(self, limit_s: float) -> list[Check]:
        found = list(self._found)
        if self.thread.is_alive():
            advice = "look for a drive or device that does not answer, or give --timeout-s more seconds"
            found.append(Check("broken", self._name, f"no answer within {limit_s:g} s", advice))
        return found
