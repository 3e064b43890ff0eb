"""A trial in the process that Ray Tune starts for it: one training run that reports its epochs to Tune.

It is `raydet.train` in a separate run folder. A trial of a killed search therefore resumes automatically, and its
workers, as actors of this process, exit when Tune stops it.
"""

import json

from ray import tune

from raydet.common.errors import RunError, UserError, one_line
from raydet.config import TrainConfig
from raydet.training.history import EpochRecord
from raydet.training.launch import free_workers
from raydet.training.train import train
from raydet.tuning.records import best_so_far, load_states, read_history

EPOCH, SCORE, OUTCOME, ERROR = "epoch", "score", "outcome", "error"
"""Keys of the reports to Tune: an epoch with the best score so far, and finally the outcome."""
_WAIT_FOR_FOLDER_S = 120.0
"""A network file system may hold the lock of a trial's process this long after the loss of its node."""
FINISHED, FAILED = "finished", "failed"
JOB = "job"
"""The only parameter known to Tune: the complete trial as JSON."""


def run_trial(parameters: dict[str, str]) -> None:
    """Train and report each validated epoch; a failure is reported as an outcome."""
    job = json.loads(parameters[JOB])
    config = TrainConfig(**job["config"])
    for trial in load_states(job["search"]):
        if trial.state in ("stopped", "failed"):  # a killed process leaves its workers' placement group behind
            free_workers(trial.folder(job["search"]))
    reporter = _Reporter(config)
    try:
        result = train(config, on_epoch=reporter.add, wait_for_folder_s=_WAIT_FOR_FOLDER_S)
        if not best_so_far(result.history, config.metric_for_best_model):
            raise RunError(f"no epoch measured {config.metric_for_best_model}")
    except Exception as error:
        reporter.end(FAILED, _reason(error))
        return
    reporter.end(FINISHED)


class _Reporter:
    """Reporter of epochs to Tune, starting with those of an earlier run, so that the scheduler sees the full trial."""

    def __init__(self, config: TrainConfig) -> None:
        assert config.epochs is not None, "the plan of a search sets them"
        self._epochs, self._metric = config.epochs, config.metric_for_best_model
        self._history = read_history(config.out)
        self._score: float | None = None
        for epoch, score in best_so_far(self._history, self._metric).items():
            self._report(epoch, score)

    def add(self, record: EpochRecord) -> None:
        """Add an epoch that has just ended."""
        self._history.append(record)
        scores = best_so_far(self._history, self._metric)
        if record.epoch in scores:
            self._report(record.epoch, scores[record.epoch])

    def _report(self, epoch: int, score: float) -> None:
        self._score = score
        if epoch < self._epochs:  # after the last epoch there is nothing to stop
            tune.report({EPOCH: epoch, SCORE: score})

    def end(self, outcome: str, error: str | None = None) -> None:
        """Report the outcome of the trial."""
        tune.report({OUTCOME: outcome, ERROR: error, SCORE: self._score})


def _reason(error: Exception) -> str:
    return one_line(error if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {error}", limit=500)
