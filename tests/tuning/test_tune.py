"""The parts of a search that require no training: space, proposals, resource shares, results and page."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raydet import TrainConfig, TuneConfig, UserError, tune
from raydet.cluster.shares import Resources
from raydet.config import to_yaml
from raydet.config.options import load, load_file
from raydet.reporting.tuning_page import Axis, TrialRow, render_tuning
from raydet.tables.output_folder import OutputFolder
from raydet.tables.table import open_table
from raydet.training.history import EpochRecord
from raydet.tuning import records
from raydet.tuning.execution import build_scheduler
from raydet.tuning.plan import Search, TuningPlan
from raydet.tuning.records import Trial
from raydet.tuning.resources import DRIVER_CPUS, Machines, Share, divide
from raydet.tuning.results import write_results
from raydet.tuning.search import OptunaProposer, RandomProposer, importances
from raydet.tuning.space import Dimension, parse_space, value_in, with_parameters
from raydet.tuning.tune import _identity, make_plan

PROJECT = Path(__file__).parents[2]
EVIL = "</script><b>&\"'"


def _config(shapes: Path | None, out: Path, **changes: Any) -> TuneConfig:
    data = {"train_data": f"{shapes}/train", "val_data": f"{shapes}/val"}
    values: dict[str, Any] = {
        "out": str(out),
        "train_config": {
            **data,
            "recipe": "none",
            "model": "rt_detr_v2_tiny",
            "image_size": 64,
            "epochs": 9,
            "learning_rate": 1e-3,
        },
        "space": {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"choice": [4, 8]}},
        "num_trials": 6,
        "search": "random",
    }
    return TuneConfig(**{**values, **changes})


def _history(*values: float | None) -> list[EpochRecord]:
    return [EpochRecord.from_json(content) for content in _contents(*values)]


def _contents(*values: float | None) -> list[dict[str, Any]]:
    contents = []
    for number, ap in enumerate(values, start=1):
        validated = {} if ap is None else {"AP": ap, "validation_loss": 9.0 / number}
        contents.append({"epoch": number, "loss": 9.0 / number, "seconds": 1.5, "start_s": 0.5, **validated})
    return contents


def _write_run(plan: TuningPlan, trial: Trial, *values: float | None) -> None:
    """Write the record and the run folder of a trained trial."""
    records.save(trial, plan.out)
    folder = Path(trial.folder(plan.out))
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "history.json").write_text(json.dumps(_contents(*values)))
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "model.safetensors").write_text(f"weights of {trial.name}")


def test_a_space_of_all_kinds(tmp_path: Path) -> None:
    space = {
        "learning_rate": {"loguniform": ["1e-4", 1e-2]},  # YAML reads a number without a decimal point as text
        "ema_decay": {"uniform": [0, 0.5]},
        "warmup_steps": {"randint": [0, 3]},
        "augmentation": {"choice": ["flip", [{"HorizontalFlip": {"p": 0.5}}]]},
        "schedule_options.num_cycles": {"choice": [1, 2]},
    }
    plan = make_plan(_config(tmp_path, tmp_path / "out", space=space))
    random = np.random.default_rng(0)
    drawn = [{each.name: each.sample(random) for each in plan.dimensions} for _ in range(300)]
    assert {values["warmup_steps"] for values in drawn} == {0, 1, 2}
    rates = np.array([values["learning_rate"] for values in drawn])
    assert rates.min() >= 1e-4 and rates.max() <= 1e-2 and 0.3 < (rates < 1e-3).mean() < 0.7
    assert all(each.contains(values[each.name]) for values in drawn for each in plan.dimensions)
    assert not plan.dimensions[2].contains(3) and not plan.dimensions[2].contains(True)
    config = with_parameters(plan.base, {"schedule_options.num_cycles": 2, "augmentation": drawn[0]["augmentation"]})
    assert config.schedule_options == {"num_cycles": 2} and plan.base.schedule_options is None
    assert value_in(config, "schedule_options.num_cycles") == 2 and value_in(plan.base, "schedule_options.x") is None


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rat": {"uniform": [0, 1]}}, r"learning_rat; did you mean learning_rate\?"),
        ({"out": {"choice": ["a", "b"]}}, "out cannot vary"),
        ({"seed.x": {"choice": [1, 2]}}, r"seed\.x: seed has no"),
        ({"seed": [1, 2]}, "seed must be one of {uniform"),
        ({"seed": {"grid": [1, 2]}}, "seed: .*`grid`.* uniform, loguniform"),
        ({"seed": {"choice": 3}}, "seed: choice .* list"),
        ({"seed": {"choice": [1, 1]}}, "seed: choice .* different values"),
        ({"seed": {"randint": [5, 5]}}, "seed: randint .*low < high"),
        ({"seed": {"randint": [0.5, 5]}}, "seed: randint .*integers"),
        ({"ema_decay": {"uniform": [0.9]}}, "ema_decay: uniform .*low < high"),
        ({"ema_decay": {"uniform": ["low", 1]}}, "ema_decay: low is not a number"),
        ({"learning_rate": {"loguniform": [0, 1]}}, "learning_rate: loguniform .*above 0"),
    ],
)
def test_mistakes_in_a_space_are_one_line(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"--space: .*{message}") as error:
        parse_space(space)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"ema_decay": {"uniform": [0.5, 1]}}}, r"--space: ema_decay: .*1\.0 .*--ema-decay"),
        ({"space": {"batch_size": {"uniform": [2, 8]}}}, "--space: batch_size: .*--batch-size"),
        ({"space": {"schedule": {"choice": ["cosine", "sine"]}}}, "--space: schedule: .*sine"),
        ({"space": {"image_size": {"choice": [64, 100]}}}, "--space: image_size: .*100 .*32"),
        ({"space": {"model": {"choice": ["rt_detr_v2_tiny", "no_such_model"]}}}, "--space: model: .*no_such_model"),
        ({"points_to_evaluate": [{"seed": 3}]}, "--points-to-evaluate: point 1 .*seed.* not in the space"),
        ({"points_to_evaluate": [{"batch_size": 0}]}, "--points-to-evaluate: point 1 .*--batch-size"),
        ({"metric": "AP:unicorn"}, "unicorn"),
        ({"train_config": {"epoch": 3}}, "`epoch`.*--train-config.*epochs"),
        ({"train_config": {"epochs": 3}}, "--train-data, --val-data"),
        ({"train_config": "absent.yaml"}, r"absent\.yaml"),
        ({"train_data": "absent"}, "absent"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    shapes: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        tune(_config(shapes, tmp_path / "out", **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_another_search_in_the_folder_is_refused_by_name(shapes: Path, tmp_path: Path) -> None:
    config = _config(shapes, tmp_path / "out")
    plan = make_plan(config)
    OutputFolder(plan.out, "tune").begin(_identity(plan))
    other = dataclasses.replace(config, num_trials=9, seed=1, train_config={**config.train_config, "epochs": 3})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"--seed: 0 → 1; train\.epochs: 9 → 3"):
        tune(other)


def test_without_a_space_the_search_lies_around_the_recipe(shapes: Path, tmp_path: Path) -> None:
    train = {"train_data": f"{shapes}/train", "val_data": f"{shapes}/val", "model": "rt_detr_v2_tiny", "image_size": 64}
    plan = make_plan(TuneConfig(out=str(tmp_path / "out"), train_config=train))
    recipe = plan.values({})
    assert recipe["learning_rate"] == plan.resolved.learning_rate == 1e-3
    assert all(dimension.contains(recipe[dimension.name]) for dimension in plan.dimensions)
    assert plan.config.space is not None and set(plan.config.space) == set(recipe)
    assert plan.base.epochs == plan.max_epochs == plan.resolved.epochs and plan.base.learning_rate is None


def test_the_run_file_is_a_search(monkeypatch: pytest.MonkeyPatch, shapes: Path, tmp_path: Path) -> None:
    monkeypatch.chdir(PROJECT)
    words = [
        "--config",
        "jobs/configs/tune.yaml",
        f"--train-data={shapes}/train",
        f"--val-data={shapes}/val",
        f"--out={tmp_path}",
    ]
    plan = make_plan(load(TuneConfig, words))
    assert plan.base.epochs == 6 and plan.base.model == "rt_detr_v2_small" and plan.metric == "AP"
    assert plan.base.train_data == f"{shapes}/train" and len(plan.dimensions) == 5


def test_the_default_comes_first_then_the_points_then_the_search(tmp_path: Path) -> None:
    config = _config(tmp_path, tmp_path / "out", points_to_evaluate=[{"learning_rate": "5e-1"}], num_trials=4)
    search = Search(make_plan(config), [])
    given = []
    while (following := search.next()) is not None:
        trial, training = following
        given.append((trial.source, training.learning_rate, training.out))
        search.end(trial.number, "finished")
    assert [source for source, _, _ in given] == ["default", "point", "search", "search"]
    assert given[0][1:] == (1e-3, str(tmp_path / "out" / "trials" / "trial-0000")) and given[1][1] == 0.5
    assert [trial.state for trial in records.load(config.out)] == ["finished"] * 4


def test_what_is_wrong_only_together_is_a_failed_trial(tmp_path: Path) -> None:
    space = {"freeze_backbone": {"choice": ["none", "all"]}, "unfreeze_epoch": {"choice": [2, None]}}
    train = {"train_data": "a", "val_data": "b", "recipe": "none", "freeze_backbone": "all"}
    plan = make_plan(_config(tmp_path, tmp_path / "out", train_config=train, space=space, num_trials=3))
    records.save(Trial(number=0, source="default", parameters={}, state="finished"), plan.out)
    parameters = {"freeze_backbone": "none", "unfreeze_epoch": 2}  # each valid alone
    records.save(Trial(number=1, source="search", parameters=parameters), plan.out)
    search = Search(plan, records.load(plan.out))
    following = search.next()
    assert search.trials[1] == records.load(plan.out)[1]
    failed = search.trials[1]
    assert following is None or following[0].number == 2
    assert failed.state == "failed" and failed.error is not None and "--unfreeze-epoch" in failed.error


def test_going_on_takes_the_unfinished_first_and_repeats_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path, tmp_path / "out", num_trials=5)
    plan = make_plan(config)
    uninterrupted = Search(plan, [])
    parameters = []
    while (following := uninterrupted.next()) is not None:
        parameters.append(following[0].parameters)
    for number, state in enumerate(("finished", "unfinished", "failed")):
        source = "default" if number == 0 else "search"
        trial = Trial(number=number, source=source, parameters=parameters[number], state=state)  # type: ignore[arg-type]
        records.save(trial, plan.out)
    for retry, expected in ((False, [1, 3, 4]), (True, [1, 2, 3, 4])):
        again = dataclasses.replace(plan, config=dataclasses.replace(config, retry_failed=retry))
        search = Search(again, [dataclasses.replace(t) for t in records.load(plan.out)[:3]])
        assert search.num_to_do == len(expected)
        done = []
        while (following := search.next()) is not None:
            done.append(following[0].number)
            assert following[0].parameters == parameters[following[0].number]
        assert done == expected
        for number in (3, 4):
            Path(plan.out, "log", "trials", f"trial-{number:04d}.json").unlink()
        for number, state in ((1, "unfinished"), (2, "failed")):
            records.save(dataclasses.replace(search.trials[number], state=state), plan.out)  # type: ignore[arg-type]


def test_a_resumed_search_draws_nothing_again_although_no_trial_has_ended(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="requires Optuna (the extra `tune`)")
    plan = make_plan(_config(tmp_path, tmp_path / "out", num_trials=8, search="optuna"))
    drawn: list[dict[str, Any]] = []
    for _ in range(3):
        search = Search(plan, records.load(plan.out))
        for number in range(len(drawn)):
            again = search.next()
            assert again is not None and again[0].number == number and again[0].parameters == drawn[number]
        for _ in range(2):
            following = search.next()
            assert following is not None
            drawn.append(following[0].parameters)
    learning_rates = [parameters["learning_rate"] for parameters in drawn[1:]]
    assert drawn[0] == {} and len(set(learning_rates)) == 5


def test_optuna_comes_closer_than_chance(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="requires Optuna (the extra `tune`)")
    dimensions = (Dimension("learning_rate", "loguniform", (1e-5, 1e-1)), Dimension("schedule", "choice", ("a", ["b"])))

    def score(values: dict[str, Any]) -> float:
        return float(1 - abs(math.log10(values["learning_rate"]) + 3) / 4 + 0.2 * (values["schedule"] == ["b"]))

    def search(proposer: Any) -> float:
        best = -1.0
        for number in range(40):
            values = proposer.propose(number)
            trial = Trial(number=number, source="search", parameters=values, state="finished")
            proposer.learn(dataclasses.replace(trial, history=_history(score(values))), values)
            best = max(best, score(values))
        return best

    learning = [OptunaProposer(dimensions, seed, metric="AP", num_trials=40, num_known=0) for seed in range(3)]
    assert np.mean([search(each) for each in learning]) > np.mean(
        [search(RandomProposer(dimensions, s)) for s in range(3)]
    )
    # Trials of an earlier run count: after 30 good ones in one region, all proposals are there.
    resumed = OptunaProposer(dimensions, 0, metric="AP", num_trials=40, num_known=30)
    for number in range(30):
        values = {"learning_rate": 10 ** (-5 + 4 * number / 29), "schedule": ["b"] if number % 2 else "a"}
        trial = Trial(number=number, source="search", parameters=values, state="finished")
        resumed.learn(dataclasses.replace(trial, history=_history(score(values))), values)
    drawn = [resumed.propose(30 + number) for number in range(8)]
    assert np.median([abs(np.log10(values["learning_rate"]) + 3) for values in drawn]) < 0.8
    outside = Trial(
        number=50, source="point", parameters={"learning_rate": 7.0}, state="stopped", history=_history(0.1)
    )
    resumed.learn(outside, {"learning_rate": 7.0, "schedule": None})


def test_importance_finds_what_mattered() -> None:
    pytest.importorskip("optuna", reason="requires Optuna (the extra `tune`)")
    dimensions = (Dimension("learning_rate", "uniform", (0.0, 1.0)), Dimension("warmup_steps", "randint", (0, 9)))
    random = np.random.default_rng(0)
    trials = []
    for _ in range(40):
        values = {each.name: each.sample(random) for each in dimensions}
        trials.append((values, -abs(values["learning_rate"] - 0.3)))
    found = importances(dimensions, trials)
    assert found is not None and sum(found.values()) == pytest.approx(1) and found["learning_rate"] > 0.6
    assert importances(dimensions, trials[:3]) is None
    assert importances(dimensions, [(values, 0.5) for values, _ in trials]) is None


def _one(cpus_per_worker: float, *, num_gpus: float = 0.0, use_gpu: bool = False) -> Resources:
    return Resources(num_gpus=num_gpus, use_gpu=use_gpu, cpus_per_worker=cpus_per_worker)


@pytest.mark.parametrize(
    ("cpus", "workers", "asked", "trials", "expected"),
    [
        (2, 1, None, 9, Share(1, False, 0.99, None)),
        (2, 1, 2, 9, Share(2, False, 0.49, 1)),
        (2, 2, None, 9, Share(1, False, 0.49, None)),
        (16, 1, None, 9, Share(8, False, 0.99, 2)),
        (16, 1, None, 3, Share(3, False, 2.0, 5)),
        (16, 4, 2, 9, Share(2, False, 0.99, 2)),
    ],
)
def test_cpus_are_shared_out_so_that_all_fit(
    cpus: int, workers: int, asked: int | None, trials: int, expected: Share
) -> None:
    machines = Machines(num_cpus=cpus, num_gpus=0, num_nodes=1, largest_node_cpus=cpus, may_grow=False)
    base = TrainConfig(train_data="a", val_data="b", out="c", num_workers=workers)
    share = divide(machines, _one(cpus / 2), base, asked, trials)
    assert share == expected
    # All workers of all concurrent trials fit, together with the processes that drive them.
    assert share.max_concurrent * (workers * share.cpus_per_worker + DRIVER_CPUS) <= cpus


def test_gpus_are_what_counts_where_there_are_some(tmp_path: Path) -> None:
    base = TrainConfig(train_data="a", val_data="b", out="c", num_workers=2)
    machines = Machines(num_cpus=32, num_gpus=8, num_nodes=2, largest_node_cpus=16, may_grow=False)
    one = _one(2.0, num_gpus=8, use_gpu=True)
    assert divide(machines, one, base, None, 20) == Share(4, True, 1.0, 4)
    with pytest.raises(UserError, match=r"--max-concurrent 5: 32 CPUs and 8 GPUs .* 4 with 2 workers"):
        divide(machines, one, base, 5, 20)
    # A growing cluster may still add nodes with GPUs.
    growing = dataclasses.replace(machines, num_gpus=0, may_grow=True)
    assert divide(growing, _one(2.0, use_gpu=True), base, 5, 20).max_concurrent == 5
    with pytest.raises(UserError, match=r"--max-concurrent 3: .* at most 2 "):
        divide(
            dataclasses.replace(machines, num_cpus=4, num_gpus=0),
            _one(1.0),
            dataclasses.replace(base, cpus_per_worker=0.8),
            3,
            9,
        )


def test_a_cluster_that_grows_from_zero_trains_one_at_a_time() -> None:
    base = TrainConfig(train_data="a", val_data="b", out="c", num_workers=2)
    machines = Machines(num_cpus=0, num_gpus=0, num_nodes=1, largest_node_cpus=0, may_grow=True)
    assert divide(machines, _one(1.0), base, None, 20) == Share(1, False, 1.0, None)


def test_asha_knows_the_trials_of_earlier_runs_and_spares_the_default(tmp_path: Path) -> None:
    config = _config(tmp_path, tmp_path / "out", scheduler="asha", reduction_factor=3)
    plan = make_plan(config)
    ended = [
        Trial(number=number, source="search", parameters={}, state="finished", history=_history(*[0.1 * number] * 9))
        for number in range(1, 7)
    ]
    scheduler = build_scheduler(plan, ended)

    def decide(number: int, epoch: int, score: float) -> str:
        trial: Any = SimpleNamespace(trial_id=str(number), config={"job": json.dumps({"number": number})})
        if number not in seen:
            scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
            seen.add(number)
        return str(scheduler.on_trial_result(None, trial, {"epoch": epoch, "score": score}))  # type: ignore[arg-type]

    seen: set[int] = set()
    assert decide(7, 1, 0.05) == "STOP" and decide(8, 1, 0.9) == "CONTINUE"
    assert decide(0, 1, 0.0) == "CONTINUE"
    assert decide(8, 2, 0.0) == "CONTINUE" and decide(8, 3, 0.01) == "STOP"
    fifo = build_scheduler(dataclasses.replace(plan, config=dataclasses.replace(config, scheduler="none")), ended)
    assert type(fifo).__name__ == "FIFOScheduler"


def test_results_are_a_table_the_best_model_and_a_page(tmp_path: Path) -> None:
    space = {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "augmentation": {"choice": ["flip", [{"Blur": None}]]}}
    plan = make_plan(_config(tmp_path, tmp_path / "out", space=space))
    Path(plan.out).mkdir()
    best = {"learning_rate": 0.005, "augmentation": [{"Blur": None}]}
    _write_run(plan, Trial(number=0, source="default", parameters={}, state="finished"), 0.1, 0.3, 0.2)
    _write_run(plan, Trial(number=1, source="search", parameters=best, state="finished"), None, 0.4, 0.3)
    _write_run(plan, Trial(number=2, source="search", parameters={"learning_rate": 1e-4}, state="stopped"), 0.05)
    failed = Trial(number=3, source="search", parameters={"learning_rate": 2e-4}, state="failed", error=EVIL)
    records.save(failed, plan.out)
    result = write_results(Search(plan, records.load(plan.out)), is_over=True, already_done=False)
    assert result is not None and result.best.name == "trial-0001" and result.value == 0.4
    assert result.default_value == 0.3 and result.parameters == best
    table = open_table(f"{plan.out}/trials", "trials")
    rows = table.read().to_pylist()
    assert [row["state"] for row in rows] == ["finished", "finished", "stopped", "failed"]
    assert [row["value"] for row in rows] == [0.3, 0.4, 0.05, None]
    assert [row["best_epoch"] for row in rows] == [2, 2, 1, None] and rows[1]["seconds"] == 6.0
    assert [row["param_learning_rate"] for row in rows] == [1e-3, 0.005, 1e-4, 2e-4]
    assert rows[1]["param_augmentation"] == '[{"Blur": null}]' and rows[0]["param_augmentation"] == "light"
    assert rows[3]["error"] == EVIL and rows[3]["checkpoint"] is None
    assert table.manifest["best"] == "trial-0001" and table.manifest["metric"] == "AP"
    assert Path(result.checkpoint, "model.safetensors").read_text() == "weights of trial-0001"
    again = load_file(TrainConfig, result.config_file, epochs=50)
    assert again.learning_rate == 0.005 and again.epochs == 50 and again.cpus_per_worker is None
    assert again.out == f"{plan.out}/final"
    text = "\n".join(result.lines())
    assert re.search(r"AP 0\.400, trial-0001 of 4 trials, 1 stopped, 1 failed; .*0\.300", text)
    page = Path(plan.out, "tune.html").read_text()
    assert EVIL not in page and "trial-0003" in page


def test_of_the_loss_less_is_better(tmp_path: Path) -> None:
    plan = make_plan(_config(tmp_path, tmp_path / "out", metric="loss"))
    assert plan.base.metric_for_best_model == "loss"
    Path(plan.out).mkdir()
    _write_run(plan, Trial(number=0, source="default", parameters={}, state="finished"), 0.1)
    _write_run(plan, Trial(number=1, source="search", parameters={"batch_size": 4}, state="finished"), 0.0, 0.0)
    result = write_results(Search(plan, records.load(plan.out)), is_over=False, already_done=False)
    assert result is not None and result.best.number == 1 and result.value == 4.5 and result.default_value == 9.0
    assert "--time-limit-s" in result.lines()[0]


def evil_page() -> str:
    """Render the page of four trials whose names and values contain markup."""
    axes = [Axis(name="learning_rate", is_log=True), Axis(name="augmentation", choices=("flip", EVIL))]
    trials = [
        TrialRow(
            name=f"trial-{number:04d}",
            state="finished" if number else "failed",
            source="search",
            values=(10.0**-number, EVIL),
            value=0.1 * number if number else None,
            best_epoch=1 if number else None,
            num_epochs=number,
            seconds=2.0,
            error=None if number else EVIL,
        )
        for number in range(4)
    ]
    return render_tuning(
        metric=EVIL,
        is_less_better=False,
        axes=axes,
        trials=trials,
        best="trial-0003",
        importance={"learning_rate": 0.75, "augmentation": 0.25},
        facts=[("Space", EVIL)],
        notes=[EVIL],
    )


def test_the_page_escapes_and_needs_nothing_else() -> None:
    page = evil_page()
    assert EVIL not in page and "<b>&" not in page
    assert 'http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;' in page
    assert not [part for part in ('src="http', 'href="http', "url(http") if part in page]
    start = page.index('id="data">') + len('id="data">')
    charts = json.loads(page[start : page.index("</script>", start)])
    assert [trial["places"] for trial in charts["trials"]] == [[1.0, 0.75], [0.6667, 0.75], [0.3333, 0.75], [0.0, 0.75]]
    assert charts["axes"][0]["ticks"][0] == [0.0, "0.001"] and charts["axes"][1]["ticks"][1] == [0.75, EVIL]
    assert charts["importance"] == [["augmentation", 0.25], ["learning_rate", 0.75]]


def test_a_config_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    for changes, message in (
        ({"space": {}}, "space is empty"),
        ({"metric": "mAP"}, "--metric .*AP, AP50"),
        ({"reduction_factor": 1}, "--reduction-factor .*2"),
        ({"num_trials": 0}, "--num-trials .*0"),
    ):
        with pytest.raises(UserError, match=message):
            _config(tmp_path, tmp_path, **changes)
    path = tmp_path / "tune.yaml"
    path.write_text(to_yaml(_config(tmp_path, tmp_path / "out")))
    assert load(TuneConfig, ["--config", str(path), "--search", "optuna"]).search == "optuna"
