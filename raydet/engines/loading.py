"""Choose and load the engine that a config asks for; only what the chosen one needs is imported."""

from raydet.config import PredictConfig
from raydet.engines.engine import Engine


def load_engine(config: PredictConfig, *, device: str, num_threads: int) -> Engine:
    """Makes the engine that a config asks for.

    Args:
        config: `checkpoint` or `model`, `engine`, `precision`, `compile`, `channels_last` and `pad_together` are read.
        device: cpu, cuda or cuda:N; openvino and onnx run on the CPU whatever it is.
        num_threads: To compute with on the CPU; torch's are set for the whole process.

    Raises:
        UserError: No such model, or the engine cannot run it so.
    """
    if config.model is not None:
        from raydet.engines.zero_shot import load_zero_shot

        return load_zero_shot(config, device=device, num_threads=num_threads)
    assert config.checkpoint is not None, "the config asks for a checkpoint or a model"
    if config.engine == "torch":
        from raydet.engines.torch_engine import TorchEngine

        return TorchEngine.load(config, device=device, num_threads=num_threads)
    if config.engine == "openvino":
        from raydet.engines.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(config, num_threads=num_threads)
    from raydet.engines.onnx_engine import OnnxEngine

    return OnnxEngine(config, num_threads=num_threads)
