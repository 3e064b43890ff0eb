"""The plan of a search, and the search with its existing and future trials."""

import dataclasses
from collections.abc import Sequence

from raydet.common.errors import UserError
from raydet.config import ResolvedTrainConfig, TrainConfig, TuneConfig
from raydet.tuning import records
from raydet.tuning.records import Trial
from raydet.tuning.search import OptunaProposer, RandomProposer
from raydet.tuning.space import Dimension, Parameters, value_in, with_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """Definition of a search.

    Attributes:
        config: Options of the search.
        base: The training config that the search varies.
        resolved: The same with every option decided, as in the first trial.
        dimensions: The options that vary.
        points: Parameters to try before the search draws its own.
        metric: Name of the metric to optimise.
        out: Output folder or URI, absolute.
        max_epochs: Epochs of the longest possible trial.
    """

    config: TuneConfig
    base: TrainConfig
    resolved: ResolvedTrainConfig
    dimensions: tuple[Dimension, ...]
    points: tuple[Parameters, ...]
    metric: str
    out: str
    max_epochs: int

    def values(self, parameters: Parameters) -> Parameters:
        """Return the value of each dimension in a trial."""
        return {
            dimension.name: parameters.get(dimension.name, value_in(self.resolved, dimension.name))
            for dimension in self.dimensions
        }


class Search:
    """All trials of a search, existing and future. Every change is written to disk before it takes effect."""

    def __init__(self, plan: TuningPlan, trials: Sequence[Trial]) -> None:
        self.plan = plan
        self.trials = {trial.number: trial for trial in trials}
        again = ("unfinished", "failed") if plan.config.retry_failed else ("unfinished",)
        self._waiting = [trial.number for trial in trials if trial.state in again]
        self._initial = [("default", {}), *(("point", point) for point in plan.points)]
        # Unfinished trials have been drawn too, and the proposer must not draw them again.
        self._proposer = _proposer(plan, num_known=len(trials))
        for trial in trials:
            if trial.number not in self._waiting:
                self._proposer.learn(trial, plan.values(trial.parameters))

    @property
    def num_to_do(self) -> int:
        """Number of trials that have not ended."""
        return len(self._waiting) + max(0, self.plan.config.num_trials - len(self.trials))

    def next(self) -> tuple[Trial, TrainConfig] | None:
        """Return the next trial and its training config, or None if no trials are left.

        A trial whose parameters are invalid in combination is recorded as failed and skipped.
        """
        while self.num_to_do:
            trial = self._new() if not self._waiting else self.trials[self._waiting.pop(0)]
            self.put(dataclasses.replace(trial, state="unfinished", error=None))
            try:
                config = with_parameters(self.plan.base, trial.parameters)
            except UserError as error:
                self.end(trial.number, "failed", str(error))
                continue
            return trial, dataclasses.replace(config, out=trial.folder(self.plan.out))
        return None

    def _new(self) -> Trial:
        number = max(self.trials, default=-1) + 1
        if number < len(self._initial):
            source, parameters = self._initial[number]
            return Trial(number=number, source=source, parameters=parameters)  # type: ignore[arg-type]
        return Trial(number=number, source="search", parameters=self._proposer.propose(number))

    def put(self, trial: Trial) -> None:
        """Write the record of a trial."""
        records.save(trial, self.plan.out)
        self.trials[trial.number] = trial

    def end(self, number: int, state: records.State, error: str | None = None) -> Trial:
        """Record the end of a trial and pass it to the proposer."""
        trial = dataclasses.replace(self.trials[number], state=state, error=error)
        trial = records.with_history(trial, self.plan.out)
        self.put(trial)
        self._proposer.learn(trial, self.plan.values(trial.parameters))
        return trial

    def best(self) -> tuple[Trial, float] | None:
        """Return the best trial so far and its score; the earliest wins ties."""
        metric = self.plan.metric
        scored = [(score, trial) for trial in self.trials.values() if (score := trial.score(metric)) is not None]
        if not scored:
            return None
        score, trial = max(scored, key=lambda pair: (pair[0], -pair[1].number))
        return trial, score


def _proposer(plan: TuningPlan, num_known: int) -> RandomProposer | OptunaProposer:
    if plan.config.search == "random":
        return RandomProposer(plan.dimensions, plan.config.seed)
    return OptunaProposer(
        plan.dimensions,
        plan.config.seed,
        metric=plan.metric,
        num_trials=plan.config.num_trials,
        num_known=num_known,
    )
