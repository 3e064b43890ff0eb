"""Installing and importing raydet beside its peers: seconds, megabytes and packages, each in an empty environment.

    make dist && python benchmarks/install.py dist/raydet-*.whl [--rounds 3] [--quick]

A first installation, which is not measured, fills uv's cache, so that the seconds leave the network out. raydet has the
versions of requirements.lock, the peers the newest ones. The imports are those after which the first object of the
package can be used; the first of each runs without compiled bytecode and is not measured either.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
UV = str(Path(sys.executable).with_name("uv"))
IMPORTS = {
    "raydet": ["import raydet", "import raydet; raydet.load"],
    "rfdetr": ["import rfdetr", "from rfdetr import RFDETRNano"],
    "ultralytics": ["import ultralytics", "from ultralytics import YOLO"],
}


def main() -> None:
    """Install and import each package, print a table and, as the last line, a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, without the peers")
    options = parser.parse_args()
    results = {}
    for name in ["raydet"] if options.quick else IMPORTS:
        requirement = str(options.wheel.resolve()) if name == "raydet" else name
        results[name] = _measure(name, requirement, num_rounds=1 if options.quick else options.rounds)
        seconds_of = results[name]["imports_s"].items()
        times = ", ".join(f"`{code}` {'failed' if own is None else f'{own:.2f} s'}" for code, own in seconds_of)
        print(f"{name}: {results[name]['install_s']:.0f} s, {results[name]['mb']:,} MB, {times}", flush=True)
    print(json.dumps(results))


def _measure(name: str, requirement: str, *, num_rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="install-") as folder:
        seconds = [_install(requirement, Path(folder, "venv")) for _ in range(num_rounds + 1)][1:]
        python = f"{folder}/venv/bin/python"
        size = subprocess.run(["du", "-sm", f"{folder}/venv"], capture_output=True, text=True, check=True).stdout
        listed = subprocess.run(
            [UV, "pip", "list", "--format=json", "--python", python], capture_output=True, check=True
        )
        versions = {item["name"]: item["version"] for item in json.loads(listed.stdout)}
        return {
            "install_s": median(seconds),
            "mb": int(size.split()[0]),
            "packages": len(versions),
            "versions": {key: versions[key] for key in (name, "torch", "transformers") if key in versions},
            "imports_s": {code: _import(python, code, folder, num_rounds=num_rounds) for code in IMPORTS[name]},
        }


def _install(requirement: str, folder: Path) -> float:
    """Install a package into an empty environment and return the seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    constraint = ["--constraint", "requirements.lock"] if requirement.endswith(".whl") else []
    started = time.perf_counter()
    command = [UV, "pip", "install", "--quiet", "--python", f"{folder}/bin/python", *constraint, requirement]
    subprocess.run(command, cwd=PROJECT, check=True)
    return time.perf_counter() - started


def _import(python: str, code: str, folder: str, *, num_rounds: int) -> float | None:
    """Return the seconds of a process that imports a package; None if that fails, for want of a system library."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HOME": folder}
    seconds = []
    for _ in range(num_rounds + 1):
        started = time.perf_counter()
        done = subprocess.run([python, "-c", code], cwd=folder, env=environment, capture_output=True, check=False)
        if done.returncode:
            print(f"`{code}` failed: {done.stderr.decode().splitlines()[-1:]}")
            return None
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


if __name__ == "__main__":
    main()
