"""Proposals for the next trials, and the importance of each option.

Both search methods implement one small interface, `Proposer`. It learns from the trials of earlier runs just as from
those of this one, so that no state has to be stored.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raydet.common.errors import UserError
from raydet.tuning.records import Trial
from raydet.tuning.space import Dimension, Parameters

_MOST_STARTING_TRIALS = 10
_FEWEST_TRIALS_FOR_IMPORTANCE = 4


class RandomProposer:
    """Random search: each trial is drawn independently, from the seed and its number."""

    def __init__(self, dimensions: Sequence[Dimension], seed: int) -> None:
        self._dimensions, self._seed = dimensions, seed

    def propose(self, number: int) -> Parameters:
        """Draw all dimensions; equal numbers yield equal parameters."""
        random = np.random.default_rng([self._seed, number])
        return {dimension.name: dimension.sample(random) for dimension in self._dimensions}

    def learn(self, trial: Trial, values: Parameters) -> None:
        """Do nothing: random search does not learn from results."""


class OptunaProposer:
    """Search near good trials by Optuna's tree-structured Parzen estimator."""

    def __init__(
        self, dimensions: Sequence[Dimension], seed: int, *, metric: str, num_trials: int, num_known: int
    ) -> None:
        """Start without knowledge; pass the trials of earlier runs to `learn`.

        The length of the complete search determines the number of random trials at its start. A resumed search with
        other known trials does not draw the same values again.
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
                constant_liar=True,  # spreads concurrent trials
            )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: dict[int, Any] = {}

    def propose(self, number: int) -> Parameters:
        """Draw parameters based on the trials so far."""
        asked = self._study.ask(self._distributions)
        self._asked[number] = asked
        return {dimension.name: _decoded(dimension, asked.params[dimension.name]) for dimension in self._dimensions}

    def learn(self, trial: Trial, values: Parameters) -> None:
        """Learn from an ended trial and its value for each dimension, whether drawn, given or the default.

        Optuna ranks a stopped trial below all finished ones, by its progress.
        """
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
    """Check that the packages of a search method are installed.

    Raises:
        UserError: Optuna is required but not installed.
    """
    if search == "optuna" and not has_optuna():
        raise UserError(
            "--search optuna requires Optuna, which is not installed; run: pip install 'raydet[tune]', or use --search "
            "random"
        )


def has_optuna() -> bool:
    """Return True if Optuna is installed, without importing it."""
    import importlib.util

    return importlib.util.find_spec("optuna") is not None


def importances(dimensions: Sequence[Dimension], trials: Sequence[tuple[Parameters, float]]) -> dict[str, float] | None:
    """Compute the share of each option in separating the best trials from the others.

    Source: Watanabe, Bansal and Hutter, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary
    Subspaces" (2023), as implemented in Optuna.

    The trials are given by their values and score (higher is better). The shares sum to 1; there are none (None) with
    too few trials, without differences, or without Optuna.
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
            # Optuna accepts no lists and mappings as choices, so all are encoded as JSON.
            result[dimension.name] = CategoricalDistribution([_encoded(dimension, value) for value in dimension.values])
        elif dimension.kind == "randint":
            result[dimension.name] = IntDistribution(*dimension.values)
        else:
            low, high = dimension.values
            result[dimension.name] = FloatDistribution(low, high, log=dimension.kind == "loguniform")
    return result


def _known(dimensions: Sequence[Dimension], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that lie in the space, encoded for Optuna; a default may lie outside."""
    return {
        dimension.name: _encoded(dimension, values[dimension.name])
        for dimension in dimensions
        if dimension.contains(values.get(dimension.name))
    }


def _encoded(dimension: Dimension, value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if dimension.kind == "choice" else value


def _decoded(dimension: Dimension, value: Any) -> Any:
    return json.loads(value) if dimension.kind == "choice" else value
