"""The forecast of a run from the records of a measured one, and from cluster files."""

import json
from pathlib import Path
from typing import Any

import pytest

from raydet import PlanConfig, UserError, plan
from raydet.cli.main import main
from raydet.cluster.forecast.measured import read_run
from raydet.cluster.forecast.nodes import NodeGroup, groups_of_yaml, with_prices

PROJECT = Path(__file__).parents[2]
CPU_NODE = {"count": 1, "num_cpus": 4.0, "num_gpus": 0.0, "accelerator": None, "memory_gb": 8}
GPU_NODE = {"count": 1, "num_cpus": 8.0, "num_gpus": 1.0, "accelerator": "L4", "memory_gb": 32}


def job(*nodes: dict[str, Any], use_gpu: bool = False, num_workers: int = 1, started: str = "") -> dict[str, Any]:
    return {"nodes": list(nodes or [CPU_NODE]), "use_gpu": use_gpu, "num_workers": num_workers, "started": started}


def scored(folder: Path, *nodes: dict[str, Any], use_gpu: bool = False, **changes: Any) -> str:
    """Write the report of a run with 30 s start-up, 100 images/s for 100 s, and 10 s at the end."""
    busy_s = {"read": 20.0, "decode": 140.0, "prepare": 40.0, "model": 80.0, "write": 10.0}
    report = {
        "num_images": 10_000,
        "wall_s": 140.0,
        "startup_s": 30.0,
        "num_model_workers": 1,
        "timeline": {"span_s": 1.0, "images": {"model": [0.0] * 30 + [100.0] * 100}},
        "stages": {name: {"busy_s": seconds} for name, seconds in busy_s.items()},
        "error": None,
        "job": job(*nodes, use_gpu=use_gpu),
        **changes,
    }
    (folder / ".job.json").write_text(json.dumps(report))
    return str(folder)


def trained(folder: Path, *, data_s: float = 0.02, epochs: int = 3, **changes: Any) -> str:
    """Write the records of a training: 40 s start-up, slower steps first, 20 s of validation and saving per epoch."""
    (folder / "log").mkdir()
    (folder / "config.yaml").write_text("batch_size: 8\nnum_workers: [1, 2]\n")
    record = {"job": job(started="2026-01-01T00:00:00+00:00", **changes), "earlier_jobs": []}
    (folder / "log" / ".job.json").write_text(json.dumps(record))
    seconds = [150.0, *[100.0] * (epochs - 1)]
    ended = [40 + sum(seconds[: number + 1]) + 20 * number for number in range(epochs)]
    history = [
        {
            "epoch": number + 1,
            "ended": f"2026-01-01T{int(at) // 3600:02}:{int(at) // 60 % 60:02}:{at % 60:06.3f}+00:00",
            "loss": 1.0,
            "seconds": seconds[number],
            "images_per_s": 1000 / seconds[number],
            "step_s": {"data": data_s, "compute": 0.7, "communication": 0.08},
            "start_s": 10.0 if number == 0 else 0.0,
            "validation_s": 15.0,
        }
        for number, at in enumerate(ended)
    ]
    (folder / "log" / "history.json").write_text(json.dumps(history))
    return str(folder)


def cluster(folder: Path, **kinds: dict[str, Any]) -> str:
    path = folder / "cluster.yaml"
    path.write_text(json.dumps({"available_node_types": kinds}))
    return str(path)


def nodes(number: int, cpus: int, gpus: int = 0) -> dict[str, Any]:
    return {"max_workers": number, "resources": {"CPU": cpus, "GPU": gpus}}


def test_the_measured_run_itself_takes_as_long_as_it_took(tmp_path: Path) -> None:
    result = plan(PlanConfig(run=scored(tmp_path), images=10_000))
    assert result.images_per_s == pytest.approx(100) and result.total_s == pytest.approx(140)
    assert not result.is_extrapolated and result.cost is None
    ten = plan(PlanConfig(run=str(tmp_path), images=100_000, price=["3.6"]))
    assert ten.total_s == pytest.approx(40 + 1000) and ten.cost == pytest.approx(1.04)


def test_a_lack_of_speed_does_not_hide_the_start_up(tmp_path: Path) -> None:
    run = scored(tmp_path, wall_s=100.0)
    assert read_run(run).overhead_s == 30.0


def test_a_run_that_is_too_short_is_measured_after_its_start_up(tmp_path: Path) -> None:
    timeline = {"span_s": 1.0, "images": {"model": [0.0, 10_000.0]}}
    result = plan(PlanConfig(run=scored(tmp_path, timeline=timeline, wall_s=34.0), images=100_000))
    assert result.images_per_s == pytest.approx(2500) and result.total_s == pytest.approx(30 + 40)
    assert any("4.0 s of work" in note for note in result.notes)


def test_on_cpus_all_stages_share_the_cores(tmp_path: Path) -> None:
    result = plan(PlanConfig(run=scored(tmp_path), images=10**6, cluster=cluster(tmp_path, work=nodes(10, 4))))
    assert result.is_extrapolated and result.num_workers == 10
    assert result.images_per_s == pytest.approx(1000) and result.bottleneck == "model"
    assert any("extrapolated from 1 worker" in note for note in result.notes)
    # One worker has the cores of one node.
    one = plan(PlanConfig(run=str(tmp_path), images=10**6, cluster=result.config.cluster, num_workers=1))
    assert one.images_per_s < 200 and one.bottleneck == "model"


def test_a_gpu_needs_cpus_beside_it(tmp_path: Path) -> None:
    # The GPU is busy 80 % of the time; 8 CPUs do 2.1 seconds of work each second.
    run = scored(tmp_path, GPU_NODE, use_gpu=True)
    assert read_run(run).cpus_per_gpu == pytest.approx(2.1 / 0.8)
    result = plan(PlanConfig(run=run, images=10**6, cluster=cluster(tmp_path, model=nodes(4, 8, 1))))
    assert (result.num_workers, result.bottleneck) == (4, "model") and result.images_per_s == pytest.approx(400)
    groups = {"model": nodes(4, 1, 1), "decode": nodes(1, 2)}
    result = plan(PlanConfig(run=run, images=10**6, cluster=cluster(tmp_path, **groups)))
    assert result.bottleneck == "decoding" and result.images_per_s < 400
    # 4 × (2.625 - 1) CPUs are missing on 4 nodes.
    assert result.nodes_per_gpu_node == pytest.approx(1.625 / 2)


@pytest.mark.parametrize(
    ("changes", "bottleneck"), [({"read": 900.0}, "reading"), ({"write": 900.0}, "writing"), ({"model": 20.0}, None)]
)
def test_the_bottleneck_is_a_stage(tmp_path: Path, changes: dict[str, float], bottleneck: str | None) -> None:
    run = scored(tmp_path, GPU_NODE, use_gpu=True)
    report = json.loads((tmp_path / ".job.json").read_text())
    for stage, seconds in changes.items():
        report["stages"][stage]["busy_s"] = seconds
    (tmp_path / ".job.json").write_text(json.dumps(report))
    result = plan(PlanConfig(run=run, images=1000))
    assert result.bottleneck == bottleneck and result.images_per_s == pytest.approx(100)


def test_training_counts_start_up_and_validation_apart(tmp_path: Path) -> None:
    run = trained(tmp_path)
    measured = read_run(run)
    assert measured.images_per_s == pytest.approx(10) and measured.epoch_overhead_s == pytest.approx(20)
    # 40 s until the first step, and 50 s that the first epoch took longer.
    assert measured.overhead_s == pytest.approx(90)
    result = plan(PlanConfig(run=run, images=1000))
    assert (result.num_images, result.bottleneck) == (3000, "model")
    assert any("fewer workers" in note for note in result.notes)
    assert result.total_s == pytest.approx(90 + 300 + 3 * 20)
    longer = plan(PlanConfig(run=run, images=10_000, epochs=2))
    assert longer.total_s == pytest.approx(90 + 2000 + 2 * 20)
    double = plan(PlanConfig(run=run, images=1000, cluster=cluster(tmp_path, work=nodes(2, 4))))
    assert double.images_per_s == pytest.approx(20) and double.is_extrapolated
    with pytest.raises(UserError, match=r"batch of 8 .*9 workers"):
        plan(PlanConfig(run=run, images=1000, num_workers=9))


def test_a_training_that_was_stopped_after_some_steps_is_measured(tmp_path: Path) -> None:
    run = trained(tmp_path, epochs=1)
    (tmp_path / "log" / "history.json").rename(tmp_path / "log" / "steps.json")
    [steps] = json.loads((tmp_path / "log" / "steps.json").read_text())
    del steps["validation_s"]
    (tmp_path / "log" / "steps.json").write_text(json.dumps(steps))
    result = plan(PlanConfig(run=run, images=10_000, epochs=3))
    assert result.images_per_s == pytest.approx(1000 / 150)
    assert result.total_s == pytest.approx(40 + 30_000 / result.images_per_s)
    assert any("validated no epoch" in note for note in result.notes)


def test_training_that_waits_for_images_needs_cpus(tmp_path: Path) -> None:
    run = trained(tmp_path, data_s=0.26, epochs=1, use_gpu=True, num_workers=1)
    (tmp_path / "log" / ".job.json").write_text(
        json.dumps({"job": job(GPU_NODE, use_gpu=True, started="2026-01-01T00:00:00+00:00"), "earlier_jobs": []})
    )
    measured = read_run(run)
    assert measured.model_busy == pytest.approx(0.75) and measured.epoch_overhead_s == 15.0
    assert measured.cpus_per_gpu == pytest.approx(8 / 0.75)
    assert plan(PlanConfig(run=run, images=1000)).bottleneck == "reading and decoding"
    more = plan(PlanConfig(run=run, images=1000, cluster=cluster(tmp_path, gpu=nodes(1, 8, 1), cpu=nodes(2, 8))))
    assert more.bottleneck == "model" and more.images_per_s == pytest.approx(measured.images_per_s / 0.75)


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--run", scored(tmp_path), "--images", "10_000_000", "--price", "0.98"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for words in ("10,000,000 images on 1 × 4cpu (4 CPUs)", "27 h 47 min", "cost: 27.2", "model", "spot"):
        assert words in shown
    assert len(shown.splitlines()) <= 25
    assert main([*command, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    content = json.loads(line)
    assert content["total_s"] == pytest.approx(100_040) and content["bottleneck"] == "model"
    assert content["measured"]["stage_s"]["decode"] == pytest.approx(0.014) and content["notes"]


def test_what_the_run_says_nothing_about_is_refused(tmp_path: Path) -> None:
    gpu = cluster(tmp_path, model=nodes(1, 8, 1))
    run = scored(tmp_path)
    with pytest.raises(UserError, match="measured without a GPU"):
        plan(PlanConfig(run=run, images=1, cluster=gpu))
    with pytest.raises(UserError, match="--epochs"):
        plan(PlanConfig(run=run, images=1, epochs=2))
    with pytest.raises(UserError, match=r"predict.*train"):
        plan(PlanConfig(run=str(tmp_path / "none"), images=1))
    run = scored(tmp_path, GPU_NODE, use_gpu=True)
    with pytest.raises(UserError, match="2 GPUs, but the cluster has 1"):
        plan(PlanConfig(run=run, images=1, num_workers=2))
    with pytest.raises(UserError, match="measured on GPUs"):
        plan(PlanConfig(run=run, images=1, cluster=cluster(tmp_path, work=nodes(1, 8))))


def test_records_that_hold_no_measurement_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scored no image.*2000`$"):
        read_run(scored(tmp_path, num_images=0))
    with pytest.raises(UserError, match="no node with CPUs"):
        read_run(scored(tmp_path, {**CPU_NODE, "num_cpus": 0.0}))
    for content, words in (("{", "JSON"), ('{"num_images": 5}', "measure again"), ("[]", "measure again")):
        (tmp_path / ".job.json").write_text(content)
        with pytest.raises(UserError, match=words):
            read_run(str(tmp_path))
    (tmp_path / ".job.json").unlink()
    run = trained(tmp_path)
    (tmp_path / "log" / "history.json").write_text("[]")
    with pytest.raises(UserError, match=r"no step .*Ctrl-C"):
        read_run(run)


def test_the_cluster_file_of_the_project() -> None:
    groups = groups_of_yaml(str(PROJECT / "cluster.yaml"))
    # The head offers no CPU; c7i.4xlarge has 16.
    assert groups == [
        NodeGroup(name="head", num_nodes=1, num_cpus=0),
        NodeGroup(name="decode", num_nodes=16, num_cpus=16),
        NodeGroup(name="model", num_nodes=4, num_cpus=8, num_gpus=1),
    ]


def test_prices_by_node_type() -> None:
    groups = groups_of_yaml(str(PROJECT / "cluster.yaml"))
    priced = with_prices(groups, ["decode=0.7", "model=1.1"])
    assert [group.price_per_hour for group in priced] == [None, 0.7, 1.1]
    assert [group.price_per_hour for group in with_prices(groups, ["2", "head=0.2"])] == [0.2, 2.0, 2.0]
    for prices, words in ((["decode=1"], "model"), (["gpu=1"], "gpu.*decode, model"), (["decode=much"], "much")):
        with pytest.raises(UserError, match=words):
            with_prices(groups, prices)


@pytest.mark.parametrize(
    ("instance", "cpus"), [("m7i.large", 2), ("m7i.xlarge", 4), ("g6.2xlarge", 8), ("c7i.24xlarge", 96)]
)
def test_aws_names_state_the_cpus(tmp_path: Path, instance: str, cpus: int) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "provider: {type: aws}\navailable_node_types:\n"
        f"  work: {{max_workers: 3, resources: {{}}, node_config: {{InstanceType: {instance}}}}}\n"
    )
    assert groups_of_yaml(str(path)) == [NodeGroup(name="work", num_nodes=3, num_cpus=cpus)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("just text", "available_node_types"),
        ("available_node_types: {a: {max_workers: 2, resources: {}}}", "CPUs of a node of type a"),
        ("available_node_types: {a: {max_workers: 0, resources: {CPU: 4}}}", "no nodes"),
        ("max_workers: 3\navailable_node_types: {a: {max_workers: 4, resources: {CPU: 4}}}", "4 nodes .* 3 "),
        ("a: [", r"cluster\.yaml"),
    ],
)
def test_a_cluster_file_that_says_too_little_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        groups_of_yaml(str(path))
    with pytest.raises(UserError, match=r"none\.yaml"):
        groups_of_yaml(str(tmp_path / "none.yaml"))
