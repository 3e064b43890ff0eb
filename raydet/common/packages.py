"""Checks for optional packages that raydet's extras install."""

import importlib.util
from pathlib import Path

from raydet.common.errors import UserError

_PACKAGES = {
    "openvino": ("openvino",),
    "int8": ("openvino", "nncf"),
    "onnx": ("onnx", "onnxruntime"),
    "lora": ("peft",),
    "browse": ("duckdb", "starlette", "uvicorn"),
    "video": ("av",),
}


def require_packages(extra: str) -> None:
    """Check that the packages of an extra, such as "openvino", are installed, without importing them.

    Raises:
        UserError: A package is missing.
    """
    missing = [name for name in _PACKAGES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{extra} requires {", ".join(missing)}; run: pip install "raydet[{extra}]"')


def has_onnxruntime_gpu() -> bool:
    """Return whether the installed ONNX Runtime is the package for NVIDIA GPUs, without importing it."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return False
    return any(Path(spec.origin).parent.glob("capi/*onnxruntime_providers_cuda*"))
