"""The `raydet` command: makes a config of the options, makes one call, says where the results are.

Exit codes: 0 done, 1 something failed, 2 a mistake in the input, 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

import sys
from collections.abc import Sequence
from typing import Any

import raydet
from raydet.common.console import Console
from raydet.common.errors import RunError, UserError
from raydet.common.redaction import without_secrets
from raydet.common.signals import ending_on_sigterm
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
from raydet.config.options import load

_USAGE = """\
usage: raydet COMMAND [options]

  prepare coco     COCO instances JSON and images → an images table
  prepare voc      Pascal VOC XML files and images → an images table
  prepare yolo     a data set in YOLO's layout → an images table
  prepare hub      a data set of the Hugging Face Hub, or a local one of that kind → an images table
  prepare images   a folder or list of images without labels, also on the web → an images table
  prepare shapes   generated pictures with labels → two images tables
  inspect          an images table → one HTML page: its numbers, what is odd, pictures as a model sees them
  train            fine-tune a detector, or train a small one from scratch
  tune             many short trainings in search of the best options
  predict          run a model over images, however many → a detections table
  evaluate         truth and detections → COCO numbers and metrics tables
  compare          two detections of the same images → how much the second is better, and how sure that is
  plan             a short measurement here → time, cost and bottleneck of so many images on a cluster
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
        with ending_on_sigterm():
            return _run(list(arguments))
    except (UserError, RunError) as error:
        print(f"raydet: error: {without_secrets(str(error))}", file=sys.stderr)
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
    config: Any = load(_COMMANDS[name], arguments, program=f"raydet {name}")
    call = getattr(raydet, name.replace(" ", "_"))
    console = Console()
    report = call(config, console=console) if name in _WITH_STATUS else call(config)
    for line in report.lines():
        console.line(line)
    return 0


_COMMANDS: dict[str, type] = {
    "prepare coco": PrepareCocoConfig,
    "prepare voc": PrepareVocConfig,
    "prepare yolo": PrepareYoloConfig,
    "prepare hub": PrepareHubConfig,
    "prepare images": PrepareImagesConfig,
    "prepare shapes": PrepareShapesConfig,
    "inspect": InspectConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "plan": PlanConfig,
    "report": ReportConfig,
    "export coco": ExportCocoConfig,
    "export voc": ExportVocConfig,
    "export yolo": ExportYoloConfig,
    "export onnx": ExportOnnxConfig,
    "push": PushConfig,
    "demo": DemoConfig,
}
"""The config of each command; `raydet.NAME` is its function, with `_` for a space."""

_WITH_STATUS = ("demo", "plan", "predict", "train", "tune")
"""Those that say on the console how far they are."""
