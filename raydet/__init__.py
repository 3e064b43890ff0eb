"""raydet: fine-tune, run and measure DETR-family object detectors at scale on Ray.

One function and one config class per command: `raydet.train(raydet.TrainConfig(...))`, and so on. The functions are
loaded when they are first used, since torch and ray take seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raydet.common.errors import UserError
from raydet.common.version import __version__
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

if TYPE_CHECKING:
    from raydet.cli.demo import demo
    from raydet.exports.coco import export_coco
    from raydet.exports.hub import push
    from raydet.exports.onnx import export_onnx
    from raydet.exports.voc import export_voc
    from raydet.exports.yolo import export_yolo
    from raydet.inspection.inspect import inspect
    from raydet.measuring.compare import compare
    from raydet.measuring.evaluate import evaluate
    from raydet.planning.plan import plan
    from raydet.preparation.prepare import (
        prepare_coco,
        prepare_hub,
        prepare_images,
        prepare_shapes,
        prepare_voc,
        prepare_yolo,
    )
    from raydet.reporting.report import report
    from raydet.scoring.predict import predict
    from raydet.training.train import train
    from raydet.tuning.tune import tune

_FUNCTIONS = {
    "compare": "raydet.measuring.compare",
    "demo": "raydet.cli.demo",
    "evaluate": "raydet.measuring.evaluate",
    "export_coco": "raydet.exports.coco",
    "export_onnx": "raydet.exports.onnx",
    "export_voc": "raydet.exports.voc",
    "export_yolo": "raydet.exports.yolo",
    "inspect": "raydet.inspection.inspect",
    "plan": "raydet.planning.plan",
    "predict": "raydet.scoring.predict",
    "prepare_coco": "raydet.preparation.prepare",
    "prepare_hub": "raydet.preparation.prepare",
    "prepare_images": "raydet.preparation.prepare",
    "prepare_shapes": "raydet.preparation.prepare",
    "prepare_voc": "raydet.preparation.prepare",
    "prepare_yolo": "raydet.preparation.prepare",
    "push": "raydet.exports.hub",
    "report": "raydet.reporting.report",
    "train": "raydet.training.train",
    "tune": "raydet.tuning.tune",
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
