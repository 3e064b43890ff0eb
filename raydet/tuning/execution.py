"""Execution of a search's trials by Ray Tune, which starts them, follows their epochs and stops weak ones."""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from raydet.cluster.ray_internals import Searcher, TrialScheduler
from raydet.tables import storage
from raydet.tuning.following import Follower
from raydet.tuning.plan import Search, TuningPlan
from raydet.tuning.records import State, Trial
from raydet.tuning.resources import DRIVER_CPUS, Share
from raydet.tuning.trial_run import EPOCH, ERROR, FAILED, JOB, OUTCOME, SCORE, run_trial

_TIMES_STARTED_AGAIN = 2
"""Retries of a trial whose process died, for instance with its node; it resumes from its newest state."""
_TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a heading at any verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders hold all results
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # otherwise Ctrl+C would look like the end of the search
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's outcome is reported without an epoch
}


def run_trials(search: Search, share: Share, follower: Follower) -> bool:
    """Run all remaining trials.

    The trials of the search are updated. Returns True if all of them ended, False if the time limit was reached first.
    """
    plan = search.plan
    clock = _TrialClock(plan.config.time_limit_s)
    notes = storage.join(plan.out, "log", "ray")  # Tune's own records, which raydet never reads
    os.environ.update(_TUNE_SETTINGS)  # the session restores the environment
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"CPU": DRIVER_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=_TrialSource(search, share),
            scheduler=build_scheduler(plan, list(search.trials.values())),
            num_samples=search.num_to_do,
            max_concurrent_trials=share.max_concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            storage_path=notes,
            name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            stop=clock,
            callbacks=[_Recorder(search, follower)],
            failure_config=tune.FailureConfig(max_failures=_TIMES_STARTED_AGAIN),
            verbose=0,
        ),
    )
    tuner.fit()
    storage.delete_folder(notes)
    return not clock.has_expired


def build_scheduler(plan: TuningPlan, ended: Sequence[Trial]) -> TrialScheduler:
    """Build Ray Tune's scheduler and feed it the trials of earlier runs of the search."""
    if plan.config.scheduler == "none":
        return FIFOScheduler()
    factor = plan.config.reduction_factor
    grace = plan.config.grace_epochs or max(1, round(plan.max_epochs / factor**2))
    scheduler = _Halving(
        time_attr=EPOCH,
        metric=SCORE,
        mode="max",
        max_t=max(plan.max_epochs, grace),
        grace_period=grace,
        reduction_factor=factor,
    )
    for trial in ended:
        if trial.state == "unfinished":
            continue  # it will report its epochs again
        known: Any = SimpleNamespace(trial_id=trial.name)
        scheduler.on_trial_add(None, known)  # type: ignore[arg-type]
        for epoch, score in trial.scores(plan.metric).items():
            if epoch < plan.max_epochs:
                result = {EPOCH: epoch, SCORE: score}
                scheduler.on_trial_result(None, known, result)
    return scheduler


class _Halving(ASHAScheduler):
    """Asynchronous successive halving that lets the default trial finish, as the reference for all others."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial continues or stops."""
        decision = super().on_trial_result(tune_controller, trial, result)
        is_default = hasattr(trial, "config") and _number(trial) == 0
        return str(TrialScheduler.CONTINUE if is_default else decision)


class _NotPickled:
    """Object that Tune stores without its state; raydet rebuilds a search from its own records."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class _TrialSource(_NotPickled, Searcher):
    """Source of trials for Tune."""

    def __init__(self, search: Search, share: Share) -> None:
        super().__init__()
        self._search, self._share = search, share

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial, encoded in one parameter."""
        following = self._search.next()
        if following is None:
            return Searcher.FINISHED
        trial, config = following
        content = {
            "number": trial.number,
            "search": self._search.plan.out,
            "config": dataclasses.asdict(self._share.applied_to(config)),
        }
        return {JOB: json.dumps(content)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Do nothing: `_Recorder` passes the result to the search."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: raydet writes its own records."""


class _Recorder(_NotPickled, tune.Callback):
    """Callback that records the trials' outcomes and reports their progress."""

    def __init__(self, search: Search, follower: Follower) -> None:
        self._search, self._follower = search, follower

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Report the start of a trial."""
        self._follower.started(self._search.trials[_number(trial)])

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Report an epoch."""
        if EPOCH in result:
            self._follower.advanced(self._search.trials[_number(trial)], result[EPOCH], result[SCORE])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record a trial that finished or failed, or that the scheduler stopped."""
        last = trial.last_result or {}
        outcome = last.get(OUTCOME)
        if outcome == FAILED:
            self._end(trial, "failed", last.get(ERROR))
        else:
            self._end(trial, "stopped" if outcome is None else "finished")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Record the failure of a trial whose process died too often."""
        reason = str(trial.get_pickled_error() or "its process died").strip().splitlines()[-1]
        self._end(trial, "failed", reason[:500])

    def _end(self, trial: Any, state: State, error: str | None = None) -> None:
        self._follower.ended(self._search.end(_number(trial), state, error), self._search.best())


class _TrialClock(_NotPickled, tune.Stopper):
    """Stopper that ends the search at its time limit; running trials stay unfinished."""

    def __init__(self, limit_s: float | None) -> None:
        self._deadline = None if limit_s is None else time.monotonic() + limit_s
        self.has_expired = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: single trials have no time limit."""
        return False

    def stop_all(self) -> bool:
        """Return True once the time limit is reached."""
        self.has_expired = self.has_expired or (self._deadline is not None and time.monotonic() >= self._deadline)
        return self.has_expired


def _number(trial: Any) -> int:
    return int(json.loads(trial.config[JOB])["number"])


def _name(trial: Any) -> str:
    return f"trial-{_number(trial):04d}"
