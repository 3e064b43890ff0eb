"""The figures for and against INT8: speed and AP of each level, and which one is taken."""

from collections.abc import Mapping
from dataclasses import dataclass

from raydet.common.console import aligned, shown
from raydet.engines.openvino.graph import FloatPrecision
from raydet.exports.openvino.levels import Level
from raydet.measuring.bootstrap import LEVEL

MIN_SPEEDUP = 1.05
"""The speed of a machine varies; a smaller gain might be none."""


@dataclass(frozen=True, kw_only=True)
class FloatTrial:
    """Float graph; `images_per_s` is that of the engine alone in its fastest turn."""

    precision: FloatPrecision
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class Int8Trial:
    """Graph in INT8.

    Attributes:
        level: What stays in float.
        precision: Precision of what stays in float.
        num_int8: Number of layers in INT8.
        num_float: Number of layers in float.
        images_per_s: Of the engine alone in its fastest turn.
        speedup: Ratio to the faster float graph.
        ap: AP on the images of the truth; None if not measured, because another trial is faster or float is.
        difference: `ap` less that of the float graph in fp32; None likewise.
        low: Lower bound of its 95 % interval; None also if too few images have labelled boxes.
        high: Upper bound; None if `low` is.
    """

    level: Level
    precision: FloatPrecision
    num_int8: int
    num_float: int
    images_per_s: float
    speedup: float
    ap: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def passes(self, max_ap_drop: float) -> bool:
        """Return True if it is faster than float, and the interval excludes a larger loss of AP."""
        return self.speedup >= MIN_SPEEDUP and self.low is not None and self.low >= -max_ap_drop


@dataclass(frozen=True, kw_only=True)
class Int8Proof:
    """Result of quantising a detector.

    Attributes:
        calibration: Images table that the scales come from.
        num_calibration_images: Number of its images that were used.
        truth: Images table that AP was measured on.
        num_images: Number of its readable images.
        max_ap_drop: Largest loss of AP that the interval may include.
        num_threads: Compute threads during the measurement of speed.
        instructions: The CPU's instructions for INT8 and bf16, as Linux names them.
        ap_float: AP of the float graph in fp32.
        floats: Float graphs.
        trials: INT8 graphs, from the most layers in INT8 to the fewest.
        taken: Index of the trial that was taken; None if INT8 was refused.
        float_layers: Modules of the layers that stay in float in that trial.
        kernels: Kernels that run its layers on this CPU, by OpenVINO's names, with the number of layers.
    """

    calibration: str
    num_calibration_images: int
    truth: str
    num_images: int
    max_ap_drop: float
    num_threads: int
    instructions: tuple[str, ...]
    ap_float: float
    floats: tuple[FloatTrial, ...]
    trials: tuple[Int8Trial, ...]
    taken: int | None
    float_layers: tuple[str, ...] = ()
    kernels: Mapping[str, int]

    def lines(self) -> list[str]:
        """Return the figures as text, and what follows from them."""
        header = ("", "float", "INT8 layers", "images/s", "speed-up", "AP", "difference", f"{100 * LEVEL:g} % interval")
        rows: list[tuple[str, ...]] = [header]
        for own in self.floats:
            ap = f"{self.ap_float:.4f}" if own.precision == "fp32" else "–"
            rows.append(("no INT8", own.precision, "0", f"{own.images_per_s:.1f}", "", ap, "", ""))
        for trial in self.trials:
            bounds = "–" if trial.low is None else f"{trial.low:+.4f} … {trial.high:+.4f}"
            layers = f"{trial.num_int8} of {trial.num_int8 + trial.num_float}"
            speed = f"{trial.images_per_s:.1f}", f"{trial.speedup:.2f}"
            measured = shown(trial.ap, ".4f"), shown(trial.difference, "+.4f"), bounds
            rows.append((trial.level, trial.precision, layers, *speed, *measured))
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        return [
            f"AP on {self.num_images:,} images, speed with {threads}, CPU: {', '.join(self.instructions) or 'unknown'}",
            *aligned(rows),
            self._verdict(),
        ]

    def _verdict(self) -> str:
        if self.taken is not None:
            trial = self.trials[self.taken]
            return (
                f"taken: {trial.level}, {trial.speedup:.2f} times as fast as float; run it with "
                f"--engine openvino --precision {trial.precision}"
            )
        fast = [trial for trial in self.trials if trial.speedup >= MIN_SPEEDUP]
        if not fast:
            return f"no INT8 graph is at least {MIN_SPEEDUP} times as fast as float; nothing was written"
        if all(trial.difference is not None and trial.low is None for trial in fast):
            return "too few images have labelled boxes for an interval; nothing was written: use a larger --truth"
        return (
            f"no INT8 graph that is faster excludes a loss of more than {self.max_ap_drop:g} AP; nothing was written: "
            "use more images as --truth for a narrower interval, or a larger --max-ap-drop"
        )
