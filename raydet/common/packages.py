"""Optional packages that an extra of raydet installs."""

import importlib.util

from raydet.common.errors import UserError

_PACKAGES = {"openvino": ("openvino",), "onnx": ("onnx", "onnxruntime")}


def require_packages(extra: str) -> None:
    """Makes sure that the packages of one of raydet's extras are there, without importing them.

    Args:
        extra: openvino or onnx.

    Raises:
        UserError: One is missing.
    """
    missing = [name for name in _PACKAGES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{extra} needs the package {", ".join(missing)}: pip install "raydet[{extra}]"')
