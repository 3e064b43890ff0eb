"""The `raydet` command: makes a config of the options, makes one call, says where the results are.

Exit codes: 0 done, 1 something failed, 2 a mistake in the input.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import raydet
from raydet.config import (
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportCocoConfig,
    ExportOnnxConfig,
    ExportVocConfig,
    ExportYoloConfig,
    PredictConfig,
    PrepareCocoConfig,
    PrepareImagesConfig,
    PrepareShapesConfig,
    PrepareVocConfig,
    PrepareYoloConfig,
    PushConfig,
    ReportConfig,
    TrainConfig,
)
from raydet.console import Console
from raydet.errors import RunError, UserError
from raydet.options import load

_USAGE = """\
usage: raydet COMMAND [options]

  prepare coco     COCO instances JSON and images → an images table
  prepare voc      Pascal VOC XML files and images → an images table
  prepare yolo     a data set in YOLO's layout → an images table
  prepare images   a folder of images without labels → an images table
  prepare shapes   generated pictures with labels → two images tables
  train            fine-tune a detector, or train a small one from scratch
  predict          run a model over images, however many → a detections table
  evaluate         truth and detections → COCO numbers and metrics tables
  compare          two detections of the same images → how much the second is better, and how sure that is
  report           metrics tables → one HTML file
  export coco      detections → COCO results JSON; images table → COCO instances JSON
  export voc       images table → Pascal VOC XML files
  export yolo      images table or detections → YOLO label files
  export onnx      a checkpoint → one ONNX file
  push             share a checkpoint on the Hugging Face Hub, with a model card
  demo             the whole way on generated pictures

raydet COMMAND --help lists the options of a command. Every command takes --config FILE.yaml, which further
options override, and --print-config, which prints the whole result.
Set RAY_ADDRESS to run on a cluster; without it train and predict start Ray on this machine.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(list(arguments))
    except (UserError, RunError) as error:
        print(f"raydet: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("raydet: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(raydet.__version__)
        return 0
    name = arguments.pop(0)
    if name in ("prepare", "export"):
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_USAGE, end="")
            return 0 if arguments else 2
        name = f"{name} {arguments.pop(0)}"
    if name not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        raise UserError(f"unknown command `{name}`; there are {known}")
    config_class, call = _COMMANDS[name]
    config: Any = load(config_class, arguments, program=f"raydet {name}")
    call(config, Console())
    return 0


def _prepare_coco(config: PrepareCocoConfig, console: Console) -> None:
    _lines(console, raydet.prepare_coco(config))


def _prepare_voc(config: PrepareVocConfig, console: Console) -> None:
    _lines(console, raydet.prepare_voc(config))


def _prepare_yolo(config: PrepareYoloConfig, console: Console) -> None:
    _lines(console, raydet.prepare_yolo(config))


def _prepare_images(config: PrepareImagesConfig, console: Console) -> None:
    _lines(console, raydet.prepare_images(config))


def _prepare_shapes(config: PrepareShapesConfig, console: Console) -> None:
    _lines(console, raydet.prepare_shapes(config))


def _evaluate(config: EvaluateConfig, console: Console) -> None:
    _lines(console, raydet.evaluate(config))


def _compare(config: CompareConfig, console: Console) -> None:
    _lines(console, raydet.compare(config))


def _report(config: ReportConfig, console: Console) -> None:
    _lines(console, raydet.report(config))


def _export_coco(config: ExportCocoConfig, console: Console) -> None:
    _lines(console, raydet.export_coco(config))


def _export_voc(config: ExportVocConfig, console: Console) -> None:
    _lines(console, raydet.export_voc(config))


def _export_yolo(config: ExportYoloConfig, console: Console) -> None:
    _lines(console, raydet.export_yolo(config))


def _export_onnx(config: ExportOnnxConfig, console: Console) -> None:
    _lines(console, raydet.export_onnx(config))


def _push(config: PushConfig, console: Console) -> None:
    _lines(console, raydet.push(config))


def _lines(console: Console, report: Any) -> None:
    for line in report.lines():
        console.line(line)


def _train(config: TrainConfig, console: Console) -> None:
    _lines(console, raydet.train(config, console=console))


def _predict(config: PredictConfig, console: Console) -> None:
    _lines(console, raydet.predict(config, console=console))


def _demo(config: DemoConfig, console: Console) -> None:
    _lines(console, raydet.demo(config, console=console))


_COMMANDS: dict[str, tuple[type, Callable[[Any, Console], None]]] = {
    "prepare coco": (PrepareCocoConfig, _prepare_coco),
    "prepare voc": (PrepareVocConfig, _prepare_voc),
    "prepare yolo": (PrepareYoloConfig, _prepare_yolo),
    "prepare images": (PrepareImagesConfig, _prepare_images),
    "prepare shapes": (PrepareShapesConfig, _prepare_shapes),
    "train": (TrainConfig, _train),
    "predict": (PredictConfig, _predict),
    "evaluate": (EvaluateConfig, _evaluate),
    "compare": (CompareConfig, _compare),
    "report": (ReportConfig, _report),
    "export coco": (ExportCocoConfig, _export_coco),
    "export voc": (ExportVocConfig, _export_voc),
    "export yolo": (ExportYoloConfig, _export_yolo),
    "export onnx": (ExportOnnxConfig, _export_onnx),
    "push": (PushConfig, _push),
    "demo": (DemoConfig, _demo),
}


if __name__ == "__main__":
    sys.exit(main())
