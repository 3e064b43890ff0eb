"""What to try next, from what has been tried; and which options mattered.

Both ways of drawing are behind one small interface, `Proposer`. Trials that an earlier run of the search has done are
told to it as those of this run are, so that no state of it has to be kept.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from raydet.common.errors import UserError
from raydet.tuning.records import Trial
from raydet.tuning.space import Dimension, Parameters

_MOST_STARTING_TRIALS = 10
_FEWEST_TRIALS_FOR_IMPORTANCE = 4


class Proposer(Protocol):
    """Draws the parameters of trials."""

    def propose(self, number: int) -> Parameters:
        """The parameters of a new trial, by its number."""
        ...

    def learn(self, trial: Trial, values: Parameters) -> None:
        """Takes in a trial that has ended.

        Args:
            trial: With its history.
            values: Its value for each dimension, whether it was drawn, given or the default.
        """
        ...


class RandomProposer:
    """Draws each trial by itself, from the seed and its number."""

    def __init__(self, dimensions: Sequence[Dimension], seed: int) -> None:
        self._dimensions, self._seed = dimensions, seed

    def propose(self, number: int) -> Parameters:
        """Draws all dimensions; the same for the same number, whenever it is asked for."""
        random = np.random.default_rng([self._seed, number])
        return {dimension.name: dimension.sample(random) for dimension in self._dimensions}

    def learn(self, trial: Trial, values: Parameters) -> None:
        """Chance has no memory."""


class OptunaProposer:
    """Draws where good trials were close by: Optuna's tree-structured Parzen estimator."""

    def __init__(
        self, dimensions: Sequence[Dimension], seed: int, *, metric: str, num_trials: int, num_known: int
    ) -> None:
        """Starts anew; trials of an earlier run of the search are then told by `learn`.

        Args:
            dimensions: Of the space.
            seed: Of the search.
            metric: What the histories are judged by.
            num_trials: In the whole search: with few, fewer of them are drawn at random before it starts to learn.
            num_known: Trials of earlier runs, so that a search that goes on does not draw the same again.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._dimensions, self._metric = dimensions, metric
        self._distributions = _distributions(dimensions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed if num_known == 0 else int(np.random.SeedSequence([seed, num_known]).generate_state(1)[0]),
                n_startup_trials=max(2, min(_MOST_STARTING_TRIALS, num_trials // 3)),
                constant_liar=True,  # keeps trials that run side by side apart
            )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: dict[int, Any] = {}

    def propose(self, number: int) -> Parameters:
        """Draws from what has been learnt so far."""
        asked = self._study.ask(self._distributions)
        self._asked[number] = asked
        return {dimension.name: _decoded(dimension, asked.params[dimension.name]) for dimension in self._dimensions}

    def learn(self, trial: Trial, values: Parameters) -> None:
        """A stopped trial counts as worse than all finished ones, and by how far it got, as Optuna has it."""
        import optuna

        states = optuna.trial.TrialState
        scores = trial.scores(self._metric)
        if trial.state == "failed" or not scores:
            state, value = states.FAIL, None
        else:
            state, value = (states.PRUNED if trial.state == "stopped" else states.COMPLETE), trial.score(self._metric)
        asked = self._asked.pop(trial.number, None)
        if asked is not None:
            for epoch, score in scores.items():
                asked.report(score, epoch)
            self._study.tell(asked, value if state == states.COMPLETE else None, state=state)
            return
        known = _known(self._dimensions, values)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params=known,
                distributions={name: self._distributions[name] for name in known},
                intermediate_values=dict(scores),
            )
        )


def check_search(search: str) -> None:
    """Makes sure that what draws the trials is installed.

    Raises:
        UserError: It is not.
    """
    if search == "optuna" and not has_optuna():
        raise UserError(
            "search optuna needs Optuna, which is not installed: pip install 'raydet[tune]', or use --search random"
        )


def has_optuna() -> bool:
    """Whether Optuna is installed; finding out does not import it."""
    import importlib.util

    return importlib.util.find_spec("optuna") is not None


def importances(dimensions: Sequence[Dimension], trials: Sequence[tuple[Parameters, float]]) -> dict[str, float] | None:
    """How much of what tells the best trials from the others lies in each option.

    By Watanabe, Bansal and Hutter, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary
    Subspaces" (2023), as Optuna has it.

    Args:
        dimensions: Of the space.
        trials: The values of each trial that was measured, and its score, of which more is better.

    Returns:
        A share for each option, all together 1; None where too few trials, or no differences, tell anything, and
        where Optuna is not installed.
    """
    inside = [(known, score) for values, score in trials if len(known := _known(dimensions, values)) == len(dimensions)]
    if not has_optuna() or len(inside) < _FEWEST_TRIALS_FOR_IMPORTANCE or len({score for _, score in inside}) < 2:
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = _distributions(dimensions)
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [optuna.trial.create_trial(params=known, distributions=distributions, value=score) for known, score in inside]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    if not found or not all(math.isfinite(value) for value in found.values()) or sum(found.values()) <= 0:
        return None
    return {dimension.name: float(found.get(dimension.name, 0.0)) for dimension in dimensions}


def _distributions(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    result: dict[str, Any] = {}
    for dimension in dimensions:
        if dimension.kind == "choice":
            # Lists and mappings are no choices to Optuna; as text they are.
            result[dimension.name] = CategoricalDistribution([_encoded(dimension, value) for value in dimension.values])
        elif dimension.kind == "randint":
            result[dimension.name] = IntDistribution(*dimension.values)
        else:
            low, high = dimension.values
            result[dimension.name] = FloatDistribution(low, high, log=dimension.kind == "loguniform")
    return result


def _known(dimensions: Sequence[Dimension], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that lie in the space, as Optuna holds them: a default may lie outside."""
    return {
        dimension.name: _encoded(dimension, values[dimension.name])
        for dimension in dimensions
        if dimension.contains(values.get(dimension.name))
    }


def _encoded(dimension: Dimension, value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if dimension.kind == "choice" else value


def _decoded(dimension: Dimension, value: Any) -> Any:
    return json.loads(value) if dimension.kind == "choice" else value
