"""One frozen dataclass per command, which checks itself; YAML files and command lines → these dataclasses.

A field is *operational* if it changes how long a run takes or where it runs, but never the result. All other fields are
the identity of a run: a folder may be continued only by a run with the same identity.
"""

from raydet.config.fields import (
    config_hash,
    default_of,
    field_names,
    fields_of,
    identity,
    is_required,
    to_yaml,
)
from raydet.config.inspecting import BrowseConfig, InspectConfig, SelectConfig
from raydet.config.measuring import CompareConfig, EvaluateConfig, EvaluationProtocol, FitConfig, ReportConfig
from raydet.config.planning import DoctorConfig, PlanConfig
from raydet.config.preparing import (
    DEFAULT_MAX_PIXELS,
    ImageStorage,
    PrepareCocoConfig,
    PrepareConfig,
    PrepareCsvConfig,
    PrepareCvatConfig,
    PrepareDetectionsConfig,
    PrepareHubConfig,
    PrepareImagesConfig,
    PrepareLabelStudioConfig,
    PrepareShapesConfig,
    PrepareTableConfig,
    PrepareVocConfig,
    PrepareYoloConfig,
)
from raydet.config.resolved import DECIDED_OPTIONS, ResolvedTrainConfig
from raydet.config.scoring import CropsConfig, CropsTask, DrawIf, Engine, Keep, Merge, PredictConfig, ResizeOn
from raydet.config.sharing import (
    ExportCocoConfig,
    ExportCvatConfig,
    ExportLabelStudioConfig,
    ExportOnnxConfig,
    ExportVocConfig,
    ExportYoloConfig,
    PushConfig,
)
from raydet.config.training import (
    COCO_METRICS,
    OVERRIDABLE,
    Augmentation,
    AugmentationSpec,
    Backbone,
    BatchNorm,
    DemoConfig,
    Schedule,
    TrainConfig,
)
from raydet.config.tuning import LoopConfig, Scheduler, Search, TuneConfig
from raydet.config.workers import Precision

__all__ = [
    "COCO_METRICS",
    "DECIDED_OPTIONS",
    "DEFAULT_MAX_PIXELS",
    "OVERRIDABLE",
    "Augmentation",
    "AugmentationSpec",
    "Backbone",
    "BatchNorm",
    "BrowseConfig",
    "CompareConfig",
    "CropsConfig",
    "CropsTask",
    "DemoConfig",
    "DoctorConfig",
    "DrawIf",
    "Engine",
    "EvaluateConfig",
    "EvaluationProtocol",
    "ExportCocoConfig",
    "ExportCvatConfig",
    "ExportLabelStudioConfig",
    "ExportOnnxConfig",
    "ExportVocConfig",
    "ExportYoloConfig",
    "FitConfig",
    "ImageStorage",
    "InspectConfig",
    "Keep",
    "LoopConfig",
    "Merge",
    "PlanConfig",
    "Precision",
    "PredictConfig",
    "PrepareCocoConfig",
    "PrepareConfig",
    "PrepareCsvConfig",
    "PrepareCvatConfig",
    "PrepareDetectionsConfig",
    "PrepareHubConfig",
    "PrepareImagesConfig",
    "PrepareLabelStudioConfig",
    "PrepareShapesConfig",
    "PrepareTableConfig",
    "PrepareVocConfig",
    "PrepareYoloConfig",
    "PushConfig",
    "ReportConfig",
    "ResizeOn",
    "ResolvedTrainConfig",
    "Schedule",
    "Scheduler",
    "Search",
    "SelectConfig",
    "TrainConfig",
    "TuneConfig",
    "config_hash",
    "default_of",
    "field_names",
    "fields_of",
    "identity",
    "is_required",
    "to_yaml",
]
