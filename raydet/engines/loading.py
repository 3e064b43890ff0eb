"""Load the engine of a config, importing only its own package."""

from collections.abc import Callable, Sequence

from raydet.common.errors import UserError
from raydet.config import PredictConfig
from raydet.engines.engine import Engine, can_use_gpu, no_fp16_on_cpu, no_gpu_package
from raydet.models.adapters.description import AdapterFolder, read_adapters
from raydet.models.geometry import ResizeRule

EngineLoader = Callable[..., Engine]
"""A function with the signature of `load_engine`."""


def resize_rule_before(config: PredictConfig) -> ResizeRule | None:
    """Return the resize rule of a config's engine without loading its weights.

    Returns:
        None if the engine must receive images at full size, as zero-shot models do, whose own image processors resize.

    Raises:
        UserError: The model does not exist or cannot be read.
    """
    if config.checkpoint is None:
        return None
    if config.adapters:
        from raydet.models.adapted.loading import adapted_resize_rule

        return adapted_resize_rule(config.checkpoint, read_adapters(config.adapters)[0])
    from raydet.models.loading import resize_rules_for

    return resize_rules_for(config.checkpoint, None)[0]


def device_here(*, use_gpu: bool | None, precision: str, engine: str | None = None) -> str:
    """Choose the device of a model in this process, cpu or cuda; `engine` is None for a command that has only torch.

    Raises:
        UserError: A GPU is required that torch does not see or the engine's package cannot use, or a precision that
            needs one.
    """
    import torch

    own = engine or "torch"
    if use_gpu and not can_use_gpu(own):
        raise no_gpu_package()
    has_gpu = use_gpu is not False and can_use_gpu(own) and torch.cuda.is_available()
    if use_gpu and not has_gpu:
        raise UserError("--use-gpu requires a GPU, but this machine has none; omit --use-gpu")
    if precision == "fp16" and not has_gpu:
        raise no_fp16_on_cpu(engine)
    return "cuda" if has_gpu else "cpu"


def load_engine(config: PredictConfig, *, device: str, num_threads: int) -> Engine:
    """Load the engine of a config; with adapters, that of the first.

    Args:
        config: `checkpoint` or `model`, `engine`, `precision`, `compile`, `channels_last`, `pad_batches` and
            `resize_on` are read.
        device: cpu, cuda or cuda:N; openvino always runs on the CPU.
        num_threads: Compute threads on the CPU; for torch, those of the process.

    Raises:
        UserError: The model does not exist, or the engine does not support it or the precision.
    """
    if config.model is not None:
        from raydet.engines.zero_shot import load_zero_shot

        return load_zero_shot(config, device=device, num_threads=num_threads)
    assert config.checkpoint is not None, "the config names neither a checkpoint nor a model"
    if config.adapters:
        return load_adapted_engines(config, read_adapters(config.adapters), device=device, num_threads=num_threads)[0]
    if config.engine == "torch":
        from raydet.engines.torch_engine import TorchEngine

        return TorchEngine.load(config, device=device, num_threads=num_threads)
    if config.engine == "openvino":
        from raydet.engines.openvino.engine import OpenVinoEngine

        return OpenVinoEngine.load(config, num_threads=num_threads)
    from raydet.engines.onnx_engine import OnnxEngine

    return OnnxEngine(config, device=device, num_threads=num_threads)


def load_adapted_engines(
    config: PredictConfig, adapters: Sequence[AdapterFolder], *, device: str, num_threads: int
) -> Sequence[Engine]:
    """Load an engine for each of some adapters of a config's checkpoint; see `load_engine`.

    The engines share weights and take each other's prepared images.

    Raises:
        UserError: An adapter does not fit the checkpoint.
    """
    from raydet.engines.torch_engine import TorchEngine

    return TorchEngine.load_adapted(config, adapters, device=device, num_threads=num_threads)
