"""The table of commands, which defines the public functions, the command line, its help and `jobs/`."""

from dataclasses import dataclass
from typing import Any

from raydet import config as configs


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: Name as typed, such as `prepare coco`.
        summary: One line for the list of commands.
        example: Options of a working command line, which may use the results of `raydet demo` in `runs/demo`.
        printed_by: Function in its module that formats the config for `--print-config`, if options depend on data or
            model; by default the config is printed as given.
        writes_page: True if the result has a `page`, the URI of an HTML file that `--open` opens.
    """

    name: str
    module: str
    summary: str
    example: str
    printed_by: str = ""
    writes_page: bool = False

    @property
    def function(self) -> str:
        """Name of the function, in its module and in `raydet`."""
        return self.name.replace(" ", "_").replace("-", "_")

    @property
    def config(self) -> Any:
        """Config class with its options, named after the command."""
        return getattr(configs, f"{self.function.title().replace('_', '')}Config")


_PREPARE = "raydet.preparation.prepare"
_COMMANDS = (
    Command(
        "prepare coco",
        _PREPARE,
        "COCO instances JSON and its images → an images table",
        "--annotations annotations/instances_train.json --images images/train --out data/train",
    ),
    Command(
        "prepare voc",
        _PREPARE,
        "Pascal VOC XML files and their images → an images table",
        "--annotations Annotations --images JPEGImages --out data --val-fraction 0.2",
    ),
    Command(
        "prepare yolo",
        _PREPARE,
        "a data set in Ultralytics layout → an images table",
        "--data data.yaml --split train --out data/train",
    ),
    Command(
        "prepare csv",
        _PREPARE,
        "a CSV file of boxes (VoTT, TensorFlow, RetinaNet) and its images → an images table",
        "--annotations labels.csv --images images --out data --val-fraction 0.2",
    ),
    Command(
        "prepare hub",
        _PREPARE,
        "a data set on the Hugging Face Hub, or a local one → an images table",
        "--dataset rishitdagli/cppe-5 --split train --out data/train",
    ),
    Command(
        "prepare cvat",
        _PREPARE,
        "CVAT's XML for images, and its images → an images table",
        "--annotations annotations.xml --images images --out data --val-fraction 0.2",
    ),
    Command(
        "prepare label-studio",
        _PREPARE,
        "Label Studio's JSON and its images → an images table",
        "--annotations project.json --images images --out data --val-fraction 0.2",
    ),
    Command(
        "prepare images",
        _PREPARE,
        "images without labels: a folder, or a list of paths or URLs → an images table",
        "--images photos --out data/photos",
    ),
    Command(
        "prepare detections",
        _PREPARE,
        "a model's detections and the images that it scored → an images table with the detections as labels",
        "--detections runs/demo/detections --data runs/demo/data/val --threshold 0.6 --out data/machine",
    ),
    Command("prepare shapes", _PREPARE, "generated images with labels → two images tables", "--out data/shapes"),
    Command(
        "inspect",
        "raydet.inspection.inspect",
        "an images table → one HTML page: statistics, suspicious labels, images as training sees them",
        "--data runs/demo/data/train --val-data runs/demo/data/val --out runs/inspect",
        writes_page=True,
    ),
    Command(
        "train",
        "raydet.training.train",
        "fine-tune a detector, or train a small one from scratch",
        "--train-data runs/demo/data/train --val-data runs/demo/data/val --out runs/train --image-size 128 --epochs 3",
        printed_by="resolved_yaml",
    ),
    Command(
        "tune",
        "raydet.tuning.tune",
        "many short training runs → the training options that give the best detector",
        "--train-config runs/demo/config.yaml --space '{learning_rate: {loguniform: [1e-4, 1e-2]}}' "
        "--num-trials 4 --search random --out runs/tune",
        writes_page=True,
    ),
    Command(
        "loop",
        "raydet.cli.loop",
        "rounds in which confident detections become labels, and a model is replaced only by one that is no worse",
        "--checkpoint runs/demo/checkpoint --unlabelled runs/demo/data/train --train-data runs/demo/data/train "
        "--val-data runs/demo/data/val --truth runs/demo/data/val --labels threshold=0.6 --train epochs=1 "
        "--rounds 1 --out runs/loop",
    ),
    Command(
        "predict",
        "raydet.scoring.predict",
        "a detector and any number of images → a detections table",
        "--checkpoint runs/demo/checkpoint --data runs/demo/data/val --out runs/detections",
    ),
    Command(
        "crops",
        "raydet.second_looks.crops",
        "detections and their images → what a second model says about each: a class, an answer, a vector",
        "--detections runs/demo/detections --data runs/demo/data/val --task zero-shot-image-classification "
        "--model openai/clip-vit-base-patch32 --labels circle,square --out runs/crops",
    ),
    Command(
        "evaluate",
        "raydet.measuring.evaluate",
        "labelled images and detections → COCO numbers and metrics tables",
        "--truth runs/demo/data/val --detections runs/demo/detections --out runs/metrics",
    ),
    Command(
        "compare",
        "raydet.measuring.compare",
        "two sets of detections of the same images → their difference, with intervals",
        "--truth runs/demo/data/val --first runs/demo/detections --second runs/detections",
    ),
    Command(
        "fit",
        "raydet.measuring.fitting.fit",
        "labelled images and a checkpoint's detections → its score thresholds and calibration",
        "--truth runs/demo/data/val --detections runs/demo/detections --checkpoint runs/demo/checkpoint",
    ),
    Command(
        "report",
        "raydet.reporting.report",
        "metrics tables → one HTML file",
        "--metrics runs/demo/metrics --train-run runs/demo",
        writes_page=True,
    ),
    Command(
        "browse",
        "raydet.browsing.browse",
        "images, detections or metrics → a page on this machine to look through them",
        "--data runs/demo/metrics",
    ),
    Command(
        "select",
        "raydet.selection.select",
        "detections → the images to label next, near-duplicates, or what is similar to an image or an object",
        "--detections runs/demo/detections --by uncertainty --num 10 --out runs/selection",
    ),
    Command(
        "export coco",
        "raydet.exports.coco",
        "detections → COCO results JSON; images table → COCO instances JSON",
        "--data runs/demo/detections --out runs/results.json",
    ),
    Command(
        "export voc",
        "raydet.exports.voc",
        "images table → Pascal VOC XML files",
        "--data runs/demo/data/val --out runs/voc --split val",
    ),
    Command(
        "export yolo",
        "raydet.exports.yolo",
        "images table or detections → YOLO label files",
        "--data runs/demo/data/val --out runs/yolo --split val",
    ),
    Command(
        "export cvat",
        "raydet.exports.cvat",
        "images table or detections → CVAT's XML for images",
        "--data runs/demo/data/val --out runs/cvat",
    ),
    Command(
        "export label-studio",
        "raydet.exports.label_studio",
        "images table or detections → Label Studio's JSON",
        "--data runs/demo/data/val --out runs/label-studio",
    ),
    Command(
        "export onnx",
        "raydet.exports.onnx",
        "a checkpoint → one ONNX file",
        "--checkpoint runs/demo/checkpoint --out runs/model.onnx",
    ),
    Command(
        "export openvino",
        "raydet.exports.openvino.export",
        "a checkpoint → a folder with an OpenVINO graph, in float or INT8",
        "--checkpoint runs/demo/checkpoint --out runs/openvino",
    ),
    Command(
        "push",
        "raydet.exports.hub",
        "upload a checkpoint or tables to the Hugging Face Hub, with a card",
        "--checkpoint runs/demo/checkpoint --repo your-name/shapes --metrics runs/demo/metrics --private",
    ),
    Command(
        "plan",
        "raydet.cluster.forecast.plan",
        "a measured run → time, cost and bottleneck of a larger one",
        "--run runs/demo/detections --images 10_000_000 --price 0.71",
    ),
    Command(
        "doctor",
        "raydet.cli.doctor",
        "check this installation: packages, devices, Ray, memory, disks, the Hub",
        "--timeout-s 30",
    ),
    Command(
        "demo",
        "raydet.cli.demo",
        "the complete pipeline on generated images, in a few minutes",
        "--out runs/demo",
        writes_page=True,
    ),
)

COMMANDS = {command.name: command for command in _COMMANDS}
"""The commands by name, in the order of the help."""
