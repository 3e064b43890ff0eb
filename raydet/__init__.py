"""raydet: fine-tune, run and measure DETR-family object detectors at scale on Ray.

One function and one config class per command: `raydet.train(raydet.TrainConfig(...))`, and so on. The functions are
loaded when they are first used, since torch and ray take seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raydet.config import (
    DemoConfig,
    EvaluateConfig,
    ExportCocoConfig,
    ExportOnnxConfig,
    PredictConfig,
    PrepareCocoConfig,
    PrepareImagesConfig,
    PrepareShapesConfig,
    PushConfig,
    TrainConfig,
)
from raydet.errors import UserError

if TYPE_CHECKING:
    from raydet.demo import demo
    from raydet.evaluation import evaluate
    from raydet.exports.coco import export_coco
    from raydet.exports.onnx import export_onnx
    from raydet.hub import push
    from raydet.inference import predict
    from raydet.preparation import prepare_coco, prepare_images, prepare_shapes
    from raydet.training import train

__version__ = "0.1.0"

_FUNCTIONS = {
    "demo": "raydet.demo",
    "evaluate": "raydet.evaluation",
    "export_coco": "raydet.exports.coco",
    "export_onnx": "raydet.exports.onnx",
    "predict": "raydet.inference",
    "prepare_coco": "raydet.preparation",
    "prepare_images": "raydet.preparation",
    "prepare_shapes": "raydet.preparation",
    "push": "raydet.hub",
    "train": "raydet.training",
}

__all__ = [
    "DemoConfig",
    "EvaluateConfig",
    "ExportCocoConfig",
    "ExportOnnxConfig",
    "PredictConfig",
    "PrepareCocoConfig",
    "PrepareImagesConfig",
    "PrepareShapesConfig",
    "PushConfig",
    "TrainConfig",
    "UserError",
    "__version__",
    "demo",
    "evaluate",
    "export_coco",
    "export_onnx",
    "predict",
    "prepare_coco",
    "prepare_images",
    "prepare_shapes",
    "push",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'raydet' has no attribute {name!r}")
