"""What raydet has made, in the formats of others: COCO JSON, ONNX, and graphs that other engines run.

The package itself is light: what only checks imports neither torch nor ONNX.
"""

import importlib.util

from raydet.errors import UserError

FIXED_SIZE_ONLY = ("deformable_detr",)
"""Model types whose graph works at one size only: transformers computes where they look from sizes in plain Python,
which a traced graph keeps as they were. The other families of `raydet.families` work at all sizes that their image
processor makes."""

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


def check_sizes(model_type: str, *, keeps_aspect: bool, where: str, remedy: str) -> None:
    """Refuses a model whose images have many sizes where its graph works at one only.

    Args:
        model_type: As in its config.
        keeps_aspect: Its image processor lets every image keep its aspect and does not pad to one size.
        where: The checkpoint.
        remedy: What would be right, for the message.

    Raises:
        UserError: It is one of `FIXED_SIZE_ONLY`, and its images have many sizes.
    """
    if keeps_aspect and model_type in FIXED_SIZE_ONLY:
        raise UserError(
            f"a {model_type} model leaves torch at one size only, and the image processor of {where} lets every image "
            f"keep its aspect; {remedy}"
        )
