"""raydet: fine-tune, run and measure DETR-family object detectors at scale on Ray.

One function and one config class per command: `raydet.train(raydet.TrainConfig(...))`, and so on. The functions are
loaded when they are first used, since torch and ray take seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raydet.config import (
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportCocoConfig,
    ExportOnnxConfig,
    ExportVocConfig,
    ExportYoloConfig,
    InspectConfig,
    PlanConfig,
    PredictConfig,
    PrepareCocoConfig,
    PrepareHubConfig,
    PrepareImagesConfig,
    PrepareShapesConfig,
    PrepareVocConfig,
    PrepareYoloConfig,
    PushConfig,
    ReportConfig,
    TrainConfig,
    TuneConfig,
)
from raydet.errors import UserError

if TYPE_CHECKING:
    from raydet.comparison import compare
    from raydet.demo import demo
    from raydet.evaluation import evaluate
    from raydet.exports.coco import export_coco
    from raydet.exports.onnx import export_onnx
    from raydet.exports.voc import export_voc
    from raydet.exports.yolo import export_yolo
    from raydet.hub import push
    from raydet.inference import predict
    from raydet.inspection import inspect
    from raydet.planning import plan
    from raydet.preparation import (
        prepare_coco,
        prepare_hub,
        prepare_images,
        prepare_shapes,
        prepare_voc,
        prepare_yolo,
    )
    from raydet.reporting import report
    from raydet.training import train
    from raydet.tuning import tune

__version__ = "0.1.0"

_FUNCTIONS = {
    "compare": "raydet.comparison",
    "demo": "raydet.demo",
    "evaluate": "raydet.evaluation",
    "export_coco": "raydet.exports.coco",
    "export_onnx": "raydet.exports.onnx",
    "export_voc": "raydet.exports.voc",
    "export_yolo": "raydet.exports.yolo",
    "inspect": "raydet.inspection",
    "plan": "raydet.planning",
    "predict": "raydet.inference",
    "prepare_coco": "raydet.preparation",
    "prepare_hub": "raydet.preparation",
    "prepare_images": "raydet.preparation",
    "prepare_shapes": "raydet.preparation",
    "prepare_voc": "raydet.preparation",
    "prepare_yolo": "raydet.preparation",
    "push": "raydet.hub",
    "report": "raydet.reporting",
    "train": "raydet.training",
    "tune": "raydet.tuning",
}

__all__ = [
    "CompareConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExportCocoConfig",
    "ExportOnnxConfig",
    "ExportVocConfig",
    "ExportYoloConfig",
    "InspectConfig",
    "PlanConfig",
    "PredictConfig",
    "PrepareCocoConfig",
    "PrepareHubConfig",
    "PrepareImagesConfig",
    "PrepareShapesConfig",
    "PrepareVocConfig",
    "PrepareYoloConfig",
    "PushConfig",
    "ReportConfig",
    "TrainConfig",
    "TuneConfig",
    "UserError",
    "__version__",
    "compare",
    "demo",
    "evaluate",
    "export_coco",
    "export_onnx",
    "export_voc",
    "export_yolo",
    "inspect",
    "plan",
    "predict",
    "prepare_coco",
    "prepare_hub",
    "prepare_images",
    "prepare_shapes",
    "prepare_voc",
    "prepare_yolo",
    "push",
    "report",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'raydet' has no attribute {name!r}")
