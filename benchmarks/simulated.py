"""A simulated accelerator: a trainer and an engine whose computations take time but no CPU."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydet.config import PredictConfig, TrainConfig
from raydet.engines.detector_engine import EngineBatch
from raydet.engines.torch_engine import TorchEngine
from raydet.models.detector import Detections
from raydet.training.in_flight import StepInputs, StepOutcome, StepValues
from raydet.training.state import Position
from raydet.training.train import train
from raydet.training.trainer import Trainer


class Device:
    """A device that runs computations of equal length one after another, and logs their times."""

    def __init__(self, seconds: float, log: Path) -> None:
        self._seconds, self._free_at = seconds, 0.0
        self._log = log.open("a", buffering=1)

    def submit(self, label: int, num_images: int) -> float:
        """Queue a computation; return the time at which it ends."""
        start = max(time.time(), self._free_at)
        self._free_at = start + self._seconds
        self._log.write(json.dumps([label, start, self._free_at, num_images]) + "\n")
        return self._free_at


def wait_until(end: float) -> None:
    """Wait without using the CPU."""
    time.sleep(max(0.0, end - time.time()))


class _Outcome(StepOutcome):
    def __init__(self, end: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._end = end

    def read(self) -> StepValues:
        wait_until(self._end)
        return super().read()


class SimulatedTrainer(Trainer):
    """A trainer whose step only waits; everything around it is real."""

    def __init__(self, *arguments: Any, seconds: float, folder: str, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._simulated = Device(seconds, Path(folder) / f"rank-{self.rank}.jsonl")

    def step(self, inputs: StepInputs) -> StepOutcome:
        """Queue a wait instead of forward, loss, backward and optimizer."""
        position = self.position
        num_images = sum(len(batch) for batch in inputs.batches.use())
        assert inputs.normaliser.num_queries, "the step has images"
        end = self._simulated.submit(position.epoch, num_images)
        self.meter.add_losses({"loss": torch.zeros(())})
        self.meter.num_steps += 1
        self.position = Position(position.epoch, position.step + 1)
        return _Outcome(end, position, inputs.image_ids, {}, {"loss": torch.zeros(())}, torch.zeros(()))


def train_simulated(folder: Path, log: Path, *, seconds: float, **options: Any) -> None:
    """Train on FOLDER/train and FOLDER/val with steps that only wait, and without validation before the last epoch.

    Args:
        folder: Folder of the tables.
        log: Folder for the simulated devices' logs; see `raydet.TrainConfig` for the options.
        seconds: Duration of a step.
        options: Other options of the training run.
    """
    config = TrainConfig(
        recipe="none",
        train_data=str(folder / "train"),
        val_data=str(folder / "val"),
        validate_every=options["epochs"],
        augmentation="flip",
        log_images=0,
        trackers=[],
        **options,
    )
    train(config, make_trainer=functools.partial(SimulatedTrainer, seconds=seconds, folder=str(log)))


class SimulatedEngine(TorchEngine):
    """An engine whose model only waits."""

    device: Device

    def start(self, prepared: Sequence[EngineBatch], *, observe: Any = None) -> Callable[[], list[Detections]]:
        """Queue a wait instead of the forward pass."""
        num_images = sum(len(part.places) for part in prepared)
        end = self.device.submit(0, num_images) if num_images else 0.0
        nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))

        def finish() -> list[Detections]:
            wait_until(end)
            return [dataclasses.replace(nothing) for _ in range(num_images)]

        return finish


def load_simulated(
    config: PredictConfig, *, device: str, num_threads: int, seconds: float, folder: str
) -> SimulatedEngine:
    """Load a checkpoint as an engine whose model only waits."""
    engine: Any = SimulatedEngine.load(config, device=device, num_threads=num_threads)
    engine.device = Device(seconds, Path(folder) / f"engine-{id(engine)}.jsonl")
    return engine  # type: ignore[no-any-return]
