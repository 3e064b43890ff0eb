"""The complete pipeline on generated images: prepare → train → predict → evaluate → report, on one Ray cluster."""

import time
from dataclasses import dataclass
from pathlib import Path

from raydet.cluster import session
from raydet.common.console import Console
from raydet.common.notebook.showing import Shown
from raydet.common.ray_address import announce
from raydet.config import DemoConfig, EvaluateConfig, PredictConfig, PrepareShapesConfig, ReportConfig, TrainConfig
from raydet.config.fields import with_options
from raydet.config.options import load_file
from raydet.measuring.evaluate import evaluate
from raydet.measuring.result import Evaluation
from raydet.preparation.prepare import prepare_shapes
from raydet.reporting.report import Report, report
from raydet.scoring.predict import PredictResult, predict
from raydet.tables import storage
from raydet.training.train import TrainResult, train

TRAIN_CONFIG = Path(__file__).with_name("demo.yaml")


@dataclass(frozen=True)
class DemoResult(Shown):
    """Result and duration of each step."""

    trained: TrainResult
    predicted: PredictResult
    evaluation: Evaluation
    report: Report
    seconds: float

    @property
    def page(self) -> str:
        """The report, which `--open` opens."""
        return self.report.page

    def lines(self) -> list[str]:
        """Return the locations of all results, for the terminal."""
        return [
            "",
            f"checkpoint  {self.trained.checkpoint}",
            f"detections  {self.predicted.out}",
            f"metrics     {self.evaluation.out}",
            f"report      {self.report.out}",
            f"took {self.seconds:.0f} s",
        ]


@with_options(DemoConfig)
def demo(config: DemoConfig, *, console: Console | None = None) -> DemoResult:
    """Generate images, train on some of them, find the shapes in the others, and measure the result.

    Raises:
        UserError: The training config does not exist, or the run folder holds something else.
    """
    console = console or Console()
    started = time.perf_counter()
    out = storage.absolute_uri(config.out)
    train_data, val_data = storage.join(out, "data", "train"), storage.join(out, "data", "val")
    training = load_file(
        TrainConfig,
        config.train_config or str(TRAIN_CONFIG),
        train_data=train_data,
        val_data=val_data,
        out=out,
        epochs=config.epochs,
        num_workers=config.num_workers,
    )
    console.title("prepare: generated images")
    shapes = PrepareShapesConfig(
        out=storage.join(out, "data"),
        num_train=config.num_train,
        num_val=config.num_val,
        image_size=training.image_size or 128,
    )
    _show(console, prepare_shapes(shapes, console=console).lines())
    announce(console.line)
    with session.session(storage.join(out, "log")):
        console.title("\ntrain: a small RT-DETRv2 from scratch")
        trained = train(training, console=console)
        _show(console, trained.lines())
        console.title("\npredict: every held-out image")
        predicted = predict(
            PredictConfig(checkpoint=trained.checkpoint, data=val_data, out=storage.join(out, "detections")),
            console=console,
        )
        _show(console, predicted.lines())
    console.title("\nevaluate: COCO numbers")
    evaluation = evaluate(
        EvaluateConfig(truth=val_data, detections=predicted.out, out=storage.join(out, "metrics"), run="demo"),
        console=console,
    )
    _show(console, evaluation.lines())
    written = report(ReportConfig(metrics=storage.join(out, "metrics"), train_run=out), console=console)
    return DemoResult(trained, predicted, evaluation, written, time.perf_counter() - started)


def _show(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.line(line)
