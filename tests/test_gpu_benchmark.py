"""The benchmark of a GPU, on the CPU with tiny models: it requires nothing but the packages that it names."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
REQUIRED = ("torch", "torchvision", "transformers", "timm", "scipy", "numpy", "pyarrow", "pillow")
PUBLISHED_MILLIONS = {"rt_detr_v2_r18": 20, "rt_detr_v2_r50": 43, "d_fine_s": 10}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of links to the required packages and to those that they require, as on a bare machine."""
    folder = tmp_path_factory.mktemp("site")
    unvisited, names = list(REQUIRED), set()
    while unvisited:
        name = unvisited.pop()
        if name in names:
            continue
        names.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for other platforms
            continue
        for file in package.files or ():
            top = file.parts[0]
            if top != ".." and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
        required = [text for text in package.requires or () if "extra ==" not in text]
        unvisited += [re.split(r"[^\w.-]", text)[0].lower() for text in required]
    return folder


def test_runs_without_ray(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-S", str(BENCHMARKS / "gpu.py"), "--quick", "--models", "d_fine_tiny"]
    command += ["--precisions", "bf16", "--case-seconds", "0.05"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.pop("skipped") == {}
    assert results.pop("machine")["image_size"] == 64
    ends = ("bare", "step", "tensors", "jpegs", "jpegs_device_resize")
    assert set(results) == {"decode", "decode_resize", *(f"d_fine_tiny_bf16_{end}" for end in ends)}
    assert all(result["images_per_s"] > 0 for result in results.values())
    step = results["d_fine_tiny_bf16_step"]
    assert set(step["parts_ms"]) == {"copy", "forward", "loss", "backward", "update"}
    assert 0.3 < sum(step["parts_ms"].values()) / step["step_ms"] < 3
    assert not (site / "ray").exists() and not (site / "msgspec").exists()


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_published_models_have_the_published_size(name: str) -> None:
    import torch

    from benchmarks.published_models import published_model

    with torch.device("meta"):
        model = published_model(name, [f"class {number}" for number in range(80)])
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == PUBLISHED_MILLIONS[name]
