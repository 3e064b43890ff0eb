"""The checks of `raydet doctor`; each returns what it found, and none needs torch or Ray in this process."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from raydet.cli.probes import ProbeError, ProbeTimeoutError, ask
from raydet.common.console import counted
from raydet.common.errors import one_line
from raydet.common.probing import failure_of, has_proxy
from raydet.common.ray_address import starts_cluster
from raydet.common.threads import available_cpus
from raydet.common.version import __version__

_GB = 2**30
_NAMED = ("ray", "torch", "transformers", "pyarrow")
_EXTRAS_FOR_WORK = ("dev", "test", "benchmark", "docs")
"""Extras for working on raydet, not with it."""
_LEAST_FREE_GB = 2.0
_LEAST_FREE_FRACTION = 0.05
"""Ray no longer stores objects on a disk that is fuller."""
_HUB_TIMEOUT_S = 5.0
_GPU_TIMEOUT_S = 15.0
_OTHER_FOLDER = "set TMPDIR (or RAY_TMPDIR) to a folder that you may write"


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        status: "broken" if commands fail because of it; "note" if some cannot do all they could.
        name: Subject.
        text: State, in one line.
        advice: Remedy, empty if there is nothing to do.
    """

    status: Literal["ok", "note", "broken"]
    name: str
    text: str
    advice: str = ""


def check_python() -> Iterator[Check]:
    """Check the version of Python."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    needed = _needed_python()
    if needed and not _fits(platform.python_version(), needed):
        yield Check("broken", "Python", text, f"use a Python {needed}")
    else:
        yield Check("ok", "Python", text)


def check_packages() -> Iterator[Check]:
    """Check that the required packages are there, in the versions that raydet was tested with."""
    versions = [f"{name} {version}" for name in _NAMED if (version := _version(name)) is not None]
    text = ", ".join([f"raydet {__version__}", *versions])
    required = [item for item in _requirements() if item.marker is None]
    missing = [str(item) for item in required if _version(item.name) is None]
    if missing:
        wanted = " ".join(f"'{item}'" for item in missing)
        yield Check("broken", "packages", f"{text}; missing: {', '.join(missing)}", f"pip install {wanted}")
        return
    others = [item for item in required if not _fits(_version(item.name) or "", str(item.specifier))]
    if others:
        untested = ", ".join(f"{item.name} {_version(item.name)}" for item in others)
        wanted = " ".join(f"'{item}'" for item in others)
        yield Check("note", "packages", f"{text}; not tested with {untested}", f"pip install {wanted}")
        return
    yield Check("ok", "packages", text)


def check_devices(timeout_s: float) -> Iterator[Check]:
    """Check the CPUs, their memory, torch, and the GPUs."""
    try:
        torch = ask("torch", timeout_s=timeout_s)
        problem = advice = ""
    except ProbeError as error:
        torch, problem, advice = {}, str(error), "pip install --force-reinstall torch torchvision"
        if isinstance(error, ProbeTimeoutError):
            advice = "the driver of a device may hang, or the machine is busy: try again with a larger --timeout-s"
    capability = f", {torch['capability']}" if torch else ""
    limits = "" if available_cpus() == os.cpu_count() else f" of {os.cpu_count()} (affinity or container limit)"
    yield Check("ok", "CPUs", f"{available_cpus()}{limits}{capability}; {_memory_gb():.0f} GB of memory")
    if not torch:
        yield Check("broken", "torch", f"cannot be used: {problem}", advice)
        return
    yield Check("ok", "torch", f"{torch['version']}, built for {torch['build'] or 'CPUs alone'}")
    yield _gpus(torch)


def _gpus(torch: dict[str, Any]) -> Check:
    if torch["gpus"]:
        names = [f"{gpu['name']} ({gpu['memory_gb']:.0f} GB)" for gpu in torch["gpus"]]
        driver = next((f"; driver {driver}" for _, driver in _nvidia_smi()[0]), "")
        return Check("ok", "GPUs", f"{_counted(names)}{driver}")
    found, reason = _nvidia_smi()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found:
        if reason:
            return Check("note", "GPUs", f"nvidia-smi fails: {reason}", "install or load the NVIDIA driver")
        return Check("ok", "GPUs", "none; models run on the CPUs")
    text = f"{_counted([name for name, _ in found])}; driver {found[0][1]}; torch does not see them"
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Check("note", "GPUs", f"{text}: CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES")
    if torch["build"] is None:
        advice = "install a build of torch with CUDA: https://pytorch.org/get-started/locally"
        return Check("note", "GPUs", f"{text}: it is built for CPUs alone", advice)
    advice = "install a newer driver, or a build of torch for this one: https://pytorch.org/get-started/locally"
    why = torch["reason"] or f"it is built for {torch['build']}"
    return Check("broken", "GPUs", f"{text}: {why}", advice)


def _nvidia_smi() -> tuple[list[tuple[str, str]], str]:
    """Return name with memory, and driver, of each GPU that the driver reports, and why it reports none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return [], ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], one_line(error, limit=200)
    if run.returncode:
        return [], one_line(run.stdout or run.stderr, limit=200) or f"exit code {run.returncode}"
    rows = [[cell.strip() for cell in line.split(",")] for line in run.stdout.splitlines() if line.count(",") == 2]
    return [
        (f"{name} ({float(mb) / 1024:.0f} GB)" if mb.isdecimal() else name, driver) for name, mb, driver in rows
    ], ""


def check_ray(address: str | None, timeout_s: float) -> Iterator[Check]:
    """Check that a Ray cluster that is named answers, and list its resources; starts none."""
    address = address or os.environ.get("RAY_ADDRESS") or ""
    if starts_cluster(address):
        yield Check("ok", "Ray", "no cluster is named; commands that need Ray start it on this machine")
        return
    scheme, _, rest = address.partition("://")
    if scheme in ("http", "https"):
        reason = failure_of(scheme == "https", rest.partition("/")[0], timeout_s=min(timeout_s, 10.0))
        state = f"cannot be reached: {reason}" if reason else "answers"
        advice = f"submit with `ray job submit --address {address}`, and unset RAY_ADDRESS for commands on this machine"
        yield Check("note", "Ray", f"{address} is a job server, which {state}", advice)
        return
    try:
        answer = ask("ray", address, timeout_s=timeout_s)
    except ProbeError as error:
        advice = "check the address, and that Ray and Python have the same versions there; or unset RAY_ADDRESS"
        yield Check("broken", "Ray", str(error), advice)
        return
    total, free = answer["total"], answer["free"]
    amounts = [f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s free" for kind in ("CPU", "GPU")]
    nodes = counted(answer["num_nodes"], "node")
    memory = f"{total.get('memory', 0) / _GB:.0f} GB of memory"
    store = f"{total.get('object_store_memory', 0) / _GB:.1f} GB of object store"
    yield Check("ok", "Ray", ", ".join([f"{address} answers: {nodes}", *amounts, memory, store]))


def check_shared_memory() -> Iterator[Check]:
    """Check that Ray's object store fits into shared memory."""
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Check("ok", "shared memory", "this system has no /dev/shm; Ray uses files")
        return
    usage = shutil.disk_usage(place)
    text = f"/dev/shm has {usage.total / _GB:.1f} GB, {usage.free / _GB:.1f} GB free"
    if usage.free < _LEAST_FREE_GB * _GB:
        advice = (
            "start the container with --shm-size=8g or more, or remove old files there; otherwise Ray uses the disk"
        )
        yield Check("note", "shared memory", text, advice)
    else:
        yield Check("ok", "shared memory", text)


def check_disks() -> Iterator[Check]:
    """Check that there is room in the folder for temporary files and in the current folder, and permission to write."""
    try:
        yield _disk("temporary files", os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), needed=True)
    except OSError as error:
        yield Check("broken", "temporary files", one_line(error), _OTHER_FOLDER)
    try:
        yield _disk("current folder", str(Path.cwd()), needed=False)
    except OSError as error:
        yield Check("broken", "current folder", one_line(error), "change to a folder that exists")


def _disk(name: str, folder: str, *, needed: bool) -> Check:
    usage = shutil.disk_usage(folder)
    text = f"{folder} has {usage.free / _GB:.1f} of {usage.total / _GB:.0f} GB free"
    if not os.access(folder, os.W_OK | os.X_OK):
        advice = _OTHER_FOLDER if needed else "give --out folders elsewhere"
        return Check("broken" if needed else "note", name, f"{text}, but it cannot be written", advice)
    if usage.free < _LEAST_FREE_GB * _GB or usage.free < _LEAST_FREE_FRACTION * usage.total:
        return Check("note", name, text, "free space there: Ray stops storing objects on a disk that is 95 % full")
    return Check("ok", name, text)


def check_hub(timeout_s: float) -> Iterator[Check]:
    """Check that the Hugging Face Hub answers, unless it must not be asked."""
    from huggingface_hub import constants, get_token

    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        yield Check("ok", "Hub", f"not asked, because HF_HUB_OFFLINE is set; models come from {constants.HF_HUB_CACHE}")
        return
    if has_proxy():
        yield Check("ok", "Hub", f"{endpoint.hostname} through the proxy of the environment, which was not asked")
        return
    reason = failure_of(endpoint.scheme == "https", endpoint.netloc, timeout_s=min(timeout_s, _HUB_TIMEOUT_S))
    if reason is not None:
        advice = f"without it, use local folders; HF_HUB_OFFLINE=1 uses what is in {constants.HF_HUB_CACHE} at once"
        yield Check("note", "Hub", f"{endpoint.hostname} cannot be reached: {reason}", advice)
        return
    login = "a token is set" if get_token() else "no token, which only private repositories and `push` need"
    yield Check("ok", "Hub", f"{endpoint.hostname} answers; {login}")


def check_extras() -> Iterator[Check]:
    """List the optional packages of each extra."""
    wanted: dict[str, list[Any]] = {}
    for item in _requirements():
        for extra in _extras():
            if item.marker is not None and item.marker.evaluate({"extra": extra}):
                wanted.setdefault(extra, []).append(item)
    for extra, items in wanted.items():
        # An extra that collects others would repeat them.
        if extra in _EXTRAS_FOR_WORK or any(item.name == "raydet" for item in items):
            continue
        missing = [item.name for item in items if _version(item.name) is None]
        name = f"extra {extra}"
        if missing:
            yield Check("note", name, f"{', '.join(missing)} not installed", f"pip install 'raydet[{extra}]'")
        else:
            yield Check("ok", name, ", ".join(f"{item.name} {_version(item.name)}" for item in items))
    if not wanted:
        yield Check("note", "extras", "unknown, because raydet runs from a folder and is not installed", "make setup")


def _requirements() -> list[Any]:
    """Return the requirements of the installed raydet, with markers for those of extras."""
    from packaging.requirements import Requirement

    try:
        items = [Requirement(line) for line in importlib.metadata.requires("raydet") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []
    extras = ["", *_extras()]
    # Those of other systems or versions of Python are left out.
    return [item for item in items if not item.marker or any(item.marker.evaluate({"extra": name}) for name in extras)]


def _extras() -> list[str]:
    try:
        return importlib.metadata.metadata("raydet").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _needed_python() -> str:
    try:
        return str(importlib.metadata.metadata("raydet").json.get("requires_python") or "")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _memory_gb() -> float:
    """Return the memory that this process may use: that of the machine, or the limit of its container."""
    import psutil

    limits = [float(psutil.virtual_memory().total)]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(float(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits) / _GB


def _counted(names: Iterable[str]) -> str:
    """Return names with their number, such as "2 × NVIDIA H200"."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} × {name}" for name, count in counts.items())
