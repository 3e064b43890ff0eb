"""Questions of `raydet doctor` that only a process of their own can ask: `python -m raydet.cli.probes NAME SECONDS`.

Importing torch or connecting to Ray may hang or end the process, for instance in a broken driver.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from raydet.common.errors import RunError, UserError, one_line


class ProbeError(Exception):
    """Failure of a probe; the message is one short reason."""


class ProbeTimeoutError(ProbeError):
    """The probe took longer than its time limit."""


def ask(name: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
    """Run a probe in a process of its own.

    Raises:
        ProbeError: The probe failed.
        ProbeTimeoutError: It took longer than `timeout_s`.
    """
    # The child may lack an installed raydet, as in a clone.
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", "raydet.cli.probes", name, f"{timeout_s:g}", *arguments]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise ProbeTimeoutError(f"no answer within {timeout_s:g} s") from None
            raise
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        last = err.strip().splitlines()[-1:] or [f"the process ended with code {process.returncode}"]
        raise ProbeError(one_line(last[0], limit=300)) from None
    if "error" in answer:
        raise ProbeError(answer["error"])
    return dict(answer)


def _torch() -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch
        import torchvision  # noqa: F401 - its C++ code must fit torch's

        has_gpu = torch.cuda.is_available()
        count = torch.cuda.device_count() if has_gpu else 0
        properties = [torch.cuda.get_device_properties(number) for number in range(count)]
        reasons = [one_line(warning.message, limit=300) for warning in caught if "CUDA" in str(warning.message)]
        if count:
            torch.zeros(1, device="cuda").add_(1).item()  # a driver may list a device that it cannot use
    cuda, rocm = torch.version.cuda, torch.version.hip
    return {
        "version": torch.__version__,
        "build": f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [{"name": one.name, "memory_gb": one.total_memory / 2**30} for one in properties],
        "reason": reasons[0] if reasons else "",
    }


def _ray(address: str) -> dict[str, Any]:
    from raydet.cluster.ray_internals import alive_nodes, total_and_free_resources
    from raydet.cluster.session import session

    with tempfile.TemporaryDirectory(prefix="raydet-") as log, session(log, address):
        total, free = total_and_free_resources()
        return {"num_nodes": len(alive_nodes()), "total": total, "free": free}


def main() -> None:
    """Run the probe that the command line names, and print its answer as the last line, in JSON."""
    name, timeout_s, *arguments = sys.argv[1:]
    # A killed doctor leaves no probe behind for long.
    signal.setitimer(signal.ITIMER_REAL, float(timeout_s) + 5)
    try:
        answer = _torch() if name == "torch" else _ray(*arguments)
    except (UserError, RunError, ImportError, OSError, RuntimeError) as error:
        answer = {"error": one_line(error, limit=500)}
    print(f"\n{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
