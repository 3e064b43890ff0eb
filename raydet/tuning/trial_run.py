"""A trial, in the process that Ray Tune starts for it: one training, whose epochs Tune hears of.

It is `raydet.train` in a run folder of its own. So it goes on by itself where an earlier run of the search was killed,
and its workers, as actors of this process, end with it when Tune ends it.
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
"""What Tune is told: an epoch with the best score so far, and at the end how it went."""
_WAIT_FOR_FOLDER_S = 120.0
"""A network file system may keep the lock of a trial's process for that long after its node was lost."""
FINISHED, FAILED = "finished", "failed"
JOB = "job"
"""The one parameter that Tune knows of: all that a trial is, as JSON."""


def run_trial(parameters: dict[str, str]) -> None:
    """Trains, and reports each epoch as it is validated; a failure is an outcome, too."""
    job = json.loads(parameters[JOB])
    config = TrainConfig(**job["config"])
    for trial in load_states(job["search"]):
        if trial.state in ("stopped", "failed"):  # its process may have been ended, which leaves what its workers held
            free_workers(trial.folder(job["search"]))
    reporter = _Reporter(config)
    try:
        result = train(config, on_epoch=reporter.add, wait_for_folder_s=_WAIT_FOR_FOLDER_S)
        if not best_so_far(result.history, config.metric_for_best_model):
            raise RunError(f"no epoch has measured {config.metric_for_best_model}")
    except Exception as error:
        reporter.end(FAILED, _reason(error))
        return
    reporter.end(FINISHED)


class _Reporter:
    """Tells Tune of epochs, of those of an earlier run first, so that the scheduler sees the whole trial."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._history = config, read_history(config.out)
        self._score: float | None = None
        for epoch, score in best_so_far(self._history, config.metric_for_best_model).items():
            self._report(epoch, score)

    def add(self, record: EpochRecord) -> None:
        """Takes in an epoch that has just ended."""
        self._history.append(record)
        scores = best_so_far(self._history, self._config.metric_for_best_model)
        if record.epoch in scores:
            self._report(record.epoch, scores[record.epoch])

    def _report(self, epoch: int, score: float) -> None:
        self._score = score
        if epoch < self._config.epochs:  # after the last one there is nothing left to stop
            tune.report({EPOCH: epoch, SCORE: score})

    def end(self, outcome: str, error: str | None = None) -> None:
        """Says how the trial went."""
        tune.report({OUTCOME: outcome, ERROR: error, SCORE: self._score})


def _reason(error: Exception) -> str:
    return one_line(error if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {error}", limit=500)
