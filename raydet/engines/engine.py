"""The contract of every engine, and the check that an engine supports a config.

A driver that only checks a config imports neither torch nor the package of an engine.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from raydet.common.errors import UserError
from raydet.common.packages import has_onnxruntime_gpu, require_packages
from raydet.common.untrusted.documents import DocumentError, parse_json
from raydet.config import PredictConfig
from raydet.models.families import FAMILIES, check_graph_sizes
from raydet.models.geometry import LANCZOS, Image, ResizeRule, SizeHW
from raydet.tables import storage
from raydet.tables.schema import Category

if TYPE_CHECKING:
    from raydet.models.detector import Detections

TORCH_INSTEAD = "use --engine torch"


class Engine(Protocol):
    """A model that is ready to run.

    Attributes:
        categories: The classes in the order of their indices.
        max_detections: Maximum number of detections per image.
        resize_rule: Resize rule of the image processor.
    """

    categories: tuple[Category, ...]
    max_detections: int
    resize_rule: ResizeRule

    def input_size_hw(self, size_hw: SizeHW) -> SizeHW:
        """Return height and width in pixels of the model's input for an image of this size, without padding."""

    def prepare(self, images: Sequence[Image]) -> Any:
        """Resize images, RGB uint8 [H, W, 3], and batch them for `start`; may run in another thread than `start`."""

    def prepare_planes(self, planes: Sequence[Image], original_sizes_hw: Sequence[SizeHW]) -> Any:
        """Batch images, RGB uint8 [3, H, W], that `resize_rule` has resized, as `prepare` does.

        Never called with `--resize-on device`, or if `raydet.engines.loading.resize_rule_before` returns None.
        `original_sizes_hw` are height and width in pixels of each image before the resize.
        """

    def start(self, prepared: Any) -> "Callable[[], list[Detections]]":
        """Start detecting objects in what `prepare` returned; an asynchronous device computes after the call returns.

        Returns:
            A function that waits for the result, one `Detections` per image, in order. Boxes are in descending score
            order, as (x, y, width, height) in absolute pixels of the image before the resize.
        """


def check_engine(config: PredictConfig, model_type: str) -> None:
    """Refuse a config of a checkpoint that its engine does not support, if this can be checked without loading it.

    Raises:
        UserError: The engine's package is not installed, or the engine does not support the precision or the model.
    """
    engine, precision = config.engine, config.precision
    if engine == "torch":
        if precision == "fp16" and config.use_gpu is False:
            raise no_fp16_on_cpu(engine)
        if config.resize_on == "device" and _processor(config).get("resample") == LANCZOS:
            raise no_lanczos_on_device(config.checkpoint)
        return
    if engine == "openvino" and precision == "fp16":
        raise no_fp16_on_cpu(engine)
    if engine == "onnx" and precision != "fp32":
        raise UserError(
            f"--engine onnx runs in fp32 only, but --precision is {precision}; --engine torch and openvino support bf16"
        )
    require_packages(engine)
    if config.use_gpu and not can_use_gpu(engine):
        raise no_gpu_package()
    family = FAMILIES[model_type]
    if family.graph_has_one_size:
        keeps_aspect, where = _keeps_aspect(_processor(config)), str(config.checkpoint)
        check_graph_sizes(family, keeps_aspect=keeps_aspect, where=where, remedy=TORCH_INSTEAD)


def can_use_gpu(engine: str) -> bool:
    """Return whether an engine, as it is installed, runs on GPUs where there are any."""
    return engine == "torch" or (engine == "onnx" and has_onnxruntime_gpu())


def no_gpu_package() -> UserError:
    """Make the error for ONNX Runtime's package for CPUs if a GPU is required."""
    return UserError(
        "--use-gpu with --engine onnx needs ONNX Runtime for GPUs, but its package for CPUs is installed; replace "
        "onnxruntime with onnxruntime-gpu, or omit --use-gpu"
    )


def no_fp16_on_cpu(engine: str | None = None) -> UserError:
    """Make the error for fp16 without a GPU; `engine` is that of a command with a choice of engines."""
    what = "the model" if engine is None else f"--engine {engine}"
    return UserError(f"--precision fp16 needs a GPU, but {what} runs on the CPU here; use --precision bf16")


def no_lanczos_on_device(checkpoint: str | None) -> UserError:
    """Make the error for a resize that only the CPU supports."""
    return UserError(f"{checkpoint} resizes with Lanczos, which torch lacks on GPUs; omit --resize-on device")


def _processor(config: PredictConfig) -> dict[str, Any]:
    """Read the config of a local image processor; empty for Hub models, which are checked when loaded."""
    assert config.checkpoint is not None, "the config names a model instead of a checkpoint"
    path = storage.join(config.checkpoint, "preprocessor_config.json")
    try:
        content = parse_json(storage.read_bytes(path)) if storage.exists(path) else {}
    except DocumentError:  # refused when the model is loaded
        return {}
    return content if isinstance(content, dict) else {}


def _keeps_aspect(content: Mapping[str, Any]) -> bool:
    size = content.get("size")
    is_fixed = isinstance(size, dict) and {"height", "width"} <= size.keys()
    return bool(content) and not is_fixed and not (content.get("do_pad", True) and content.get("pad_size"))
