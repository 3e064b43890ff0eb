"""A plan follows from its measurements by the formula in its module, and the measurements are real."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydet import PlanConfig, UserError
from raydet.cli.main import main
from raydet.cluster.timeline import Window
from raydet.common.errors import RunError
from raydet.config import PlannedJob
from raydet.planning.answer import PlanResult
from raydet.planning.nodes import node_groups
from raydet.planning.plan import plan, plan_for
from raydet.planning.processes import Watched, run_watched
from raydet.planning.throughput import PROBE_VERSION, NodeGroup, Probe, StageCost, Workers, combine, forecast
from raydet.tables.table import TableWriter, open_table

PROJECT = Path(__file__).parents[2]


def cost(cpu_s: float, wall_s: float | None = None) -> StageCost:
    return StageCost(cpu_s=cpu_s, wall_s=cpu_s if wall_s is None else wall_s)


STAGES = {
    "read": cost(0.001),
    "decode": cost(0.010),
    "prepare": cost(0.003),
    "model": cost(0.080),
    "write": cost(0.001),
}
# 4 CPUs, as many copies of one thread: 100 ms of CPU an image, 40 images/s by the formula.
CPU = Probe(
    job="predict",
    model="m",
    device="cpu",
    machine="a",
    num_cpus=4,
    stages=STAGES,
    model_all_threads=cost(0.080, 0.020),
    ray_cpu_s=0.005,
    run_images_per_s=40.0,
    run_workers=4,
    run_threads=1,
    run_decoded_ahead=0.0,
    startup_s=20.0,
    worker_startup_cpu_s=8.0,
    image_bytes=100_000,
    pixel_bytes=1_000_000,
    gradient_bytes=0,
    waiting_s=0.0,
    waiting_workers=4,
    batch_size=16,
    source_read_s=0.0,
)
GPU = dataclasses.replace(
    CPU,
    device="cuda",
    machine="b",
    stages={**STAGES, "model": cost(0.001, 0.002), "prepare": cost(0.0015)},
    model_all_threads=cost(0.001, 0.002),
    # The CPUs, 4 for 19.5 ms an image, are what limits this machine.
    run_images_per_s=4 / 0.0195,
    run_workers=1,
    run_threads=4,
)
TRAIN = dataclasses.replace(
    CPU,
    job="train",
    stages={"read": cost(0.0), "decode": cost(0.02), "model": cost(0.18)},
    model_all_threads=cost(0.18, 0.05),
    ray_cpu_s=0.0,
    # Nine tenths of the formula: 4 CPUs, 4 threads of 50 ms and 20 ms.
    run_images_per_s=0.9 * 4 / 0.22,
    run_workers=1,
    run_threads=4,
    gradient_bytes=125_000_000.0,
    batch_size=8,
)


def config(**options: Any) -> PlanConfig:
    return PlanConfig(**{"images": 1_000_000, "checkpoint": "c", "threads_per_worker": 1, **options})


def cpu_nodes(number: int, cpus: int = 4) -> NodeGroup:
    return NodeGroup(name="CPU nodes", num_nodes=number, num_cpus=cpus)


def gpu_nodes(number: int, cpus: int = 8, gpus: int = 1) -> NodeGroup:
    return NodeGroup(name="GPU nodes", num_nodes=number, num_cpus=cpus, num_gpus=gpus)


def save(folder: Path, name: str, probe: Probe) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(probe.to_dict()))
    return str(path)


def test_the_measured_machine_is_as_fast_as_its_own_run() -> None:
    for speed in (25.0, 40.0):
        probe = dataclasses.replace(CPU, run_images_per_s=speed)
        result = plan_for(config(), [cpu_nodes(1)], [probe])
        assert result.forecast.images_per_s == pytest.approx(speed)
        assert result.total_s == pytest.approx(20 + 1_000_000 / speed)


def test_a_run_in_faster_minutes_than_its_stages_proves_nothing() -> None:
    probe = dataclasses.replace(CPU, run_images_per_s=60.0)
    assert plan_for(config(), [cpu_nodes(1)], [probe]).forecast.images_per_s == pytest.approx(40.0)


def test_what_was_decoded_before_is_no_speed_that_lasts() -> None:
    # Half of the images had been decoded and took the CPUs 94.5 ms instead of 100.
    probe = dataclasses.replace(CPU, run_images_per_s=0.9 * 4 / 0.0945, run_decoded_ahead=0.5)
    assert plan_for(config(), [cpu_nodes(1)], [probe]).forecast.images_per_s == pytest.approx(0.9 * 4 / 0.1)


def test_cpu_seconds_of_the_stages_add_up() -> None:
    result = plan_for(config(), [cpu_nodes(8, cpus=16)], [CPU])
    assert result.workers == Workers(number=128, threads=1, on_gpu=False)
    assert result.forecast.bottleneck == "CPUs"
    assert result.forecast.images_per_s == pytest.approx(8 * 16 / 0.100)
    stages = result.forecast.stages
    assert {name: round(load.cpu_s * 1e3, 3) for name, load in stages.items()} == {
        "read": 1,
        "decode": 10,
        "prepare": 3,
        "model": 80,
        "write": 1,
        "ray": 5,
    }
    shares = [load.busy_share for name, load in stages.items() if name != "model"]
    assert sum(shares) == pytest.approx(0.2)  # of the CPUs; the model has the other four fifths of them
    assert result.forecast.limits["model"] == pytest.approx(128 / 0.080)
    assert stages["model"].busy_share == pytest.approx(0.8)
    assert result.storage_mb_per_s == pytest.approx(128) and result.pixels_mb_per_s == pytest.approx(1280)


def test_few_workers_are_the_bottleneck_however_many_cpus_there_are() -> None:
    result = plan_for(config(num_workers=2, threads_per_worker=4), [cpu_nodes(8, cpus=16)], [CPU])
    assert result.forecast.bottleneck == "model" and result.forecast.images_per_s == pytest.approx(2 / 0.020)


def test_threads_hold_their_cpus_also_where_they_wait() -> None:
    def limits(cpus: int) -> Any:
        asked = config(num_workers=1, threads_per_worker=4)
        return plan_for(asked, [cpu_nodes(1, cpus=cpus)], [probe]).forecast.limits

    # The model takes 25 ms with four threads, of these 80 ms of CPU; all else takes 20 ms of CPU.
    probe = dataclasses.replace(CPU, model_all_threads=cost(0.080, 0.025))
    assert limits(4)["threads"] == pytest.approx(4 / 0.120) and limits(4)["model"] == pytest.approx(1 / 0.025)
    # With the CPUs that all else takes at that rate beside them, the threads have theirs to themselves.
    assert limits(5)["threads"] > limits(5)["model"]
    one_each = plan_for(config(), [cpu_nodes(1)], [probe]).forecast.limits
    assert one_each["CPUs"] == pytest.approx(4 / 0.1) and "threads" not in one_each
    slow = plan_for(config(num_workers=1, threads_per_worker=4), [cpu_nodes(1)], [probe])
    assert any("bottleneck: threads; they hold CPUs while they wait" in line for line in slow.lines())


def test_threads_follow_amdahl_through_both_measurements() -> None:
    probe = dataclasses.replace(CPU, stages={**STAGES, "model": cost(0.08, 0.08)}, model_all_threads=cost(0.12, 0.032))
    assert probe.model_cost(1) == cost(0.08, 0.08)
    assert probe.model_cost(4).wall_s == pytest.approx(0.032) and probe.model_cost(4).cpu_s == pytest.approx(0.12)
    assert probe.model_cost(2).wall_s == pytest.approx(0.016 + 0.064 / 2)
    assert probe.model_cost(10**6).wall_s == pytest.approx(0.016, rel=1e-4)


def test_a_gpu_node_needs_cpus_beside_it() -> None:
    result = plan_for(config(), [cpu_nodes(2, cpus=4), gpu_nodes(1, cpus=4)], [CPU, GPU])
    answer = result.forecast
    # Reading 1, decoding 10, resizing 1.5, the model's own 1, writing 1, Ray 5 ms of CPU; the GPU takes 2 ms.
    assert answer.limits["model"] == pytest.approx(1 / 0.002)
    assert answer.limits["CPUs of GPU nodes"] == pytest.approx(4 / 0.0025)
    assert answer.limits["CPUs"] == pytest.approx(12 / 0.0195)
    assert answer.bottleneck == "model"
    assert answer.cpus_to_balance == pytest.approx(500 * 0.0195 - 4)
    assert result.cpu_nodes_per_gpu_node == pytest.approx((500 * 0.0195 - 4) / 4)
    alone = plan_for(config(), [gpu_nodes(1, cpus=4)], [CPU, GPU])
    assert alone.forecast.bottleneck == "CPUs" and alone.cpu_nodes_per_gpu_node is None
    assert any("5.8 CPUs" in line for line in alone.lines())


@given(
    decode=st.floats(1e-4, 0.5),
    on_gpu=st.floats(1e-4, 0.1),
    cpus=st.integers(2, 128),
    gpus=st.integers(1, 8),
    nodes=st.integers(1, 20),
)
def test_with_the_balancing_cpus_neither_side_waits(
    decode: float, on_gpu: float, cpus: int, gpus: int, nodes: int
) -> None:
    probe = dataclasses.replace(
        GPU,
        stages={**GPU.stages, "decode": cost(decode), "model": cost(0.001, on_gpu)},
        model_all_threads=cost(0.001, on_gpu),
    )
    group = gpu_nodes(nodes, cpus=cpus, gpus=gpus)
    workers = Workers(number=nodes * gpus, threads=1, on_gpu=True)
    options: dict[str, Any] = {"batch_size": 16, "network_bytes_per_s": 1e9}
    wanted = forecast(probe, probe, [group], workers, **options).cpus_to_balance
    assert wanted is not None
    # Rounded up to whole CPUs, and from there the CPUs are no longer what limits.
    more = [group, cpu_nodes(1, cpus=int(wanted) + 1)]
    balanced = forecast(probe, probe, more, workers, **options)
    others = [limit for name, limit in balanced.limits.items() if name != "CPUs"]
    assert balanced.limits["CPUs"] >= min(others) * (1 - 1e-9)
    if wanted > 4 * nodes:
        fewer = [group, cpu_nodes(1, cpus=int(wanted * 0.9))]
        assert forecast(probe, probe, fewer, workers, **options).images_per_s <= balanced.images_per_s


@given(number=st.integers(1, 50), cpus=st.integers(8, 96), decode=st.floats(1e-5, 1), model=st.floats(1e-4, 2))
def test_more_nodes_never_make_it_slower(number: int, cpus: int, decode: float, model: float) -> None:
    probe = dataclasses.replace(CPU, stages={**STAGES, "decode": cost(decode), "model": cost(model)})
    rates = [
        plan_for(config(), [cpu_nodes(nodes, cpus=cpus)], [probe]).forecast.images_per_s
        for nodes in (number, number + 1)
    ]
    assert rates[1] >= rates[0] * (1 - 1e-9)


def test_storage_that_answers_late_is_the_bottleneck() -> None:
    late = dataclasses.replace(CPU, source_read_s=0.5)
    result = plan_for(config(num_workers=3), [cpu_nodes(8, cpus=16)], [late])
    assert result.forecast.bottleneck == "reading" and result.forecast.images_per_s == pytest.approx(3 / 0.5)


def test_workers_that_train_share_a_batch_and_send_gradients() -> None:
    def rate(**options: Any) -> float:
        asked = config(job="train", num_workers=2, threads_per_worker=4, **options)
        return plan_for(asked, [cpu_nodes(2)], [TRAIN]).forecast.images_per_s

    one = plan_for(config(job="train", threads_per_worker=4), [cpu_nodes(1)], [TRAIN]).forecast
    assert one.images_per_s == pytest.approx(TRAIN.run_images_per_s)
    # Two send 2 · 1/2 · 125 MB a step: 1 ms, or a second in which 8 CPUs are held.
    assert rate(network_gbit_per_s=1000.0) == pytest.approx(0.9 * 8 / (4 * (0.05 + 0.001 * 2 / 8) + 0.02))
    assert rate(network_gbit_per_s=1.0) == pytest.approx(0.9 * 8 / (4 * (0.05 + 1.0 * 2 / 8) + 0.02))
    epochs = plan_for(config(job="train", threads_per_worker=4, images=1000, epochs=30), [cpu_nodes(1)], [TRAIN])
    assert epochs.num_images == 30_000 and epochs.total_s == pytest.approx(20 + 30_000 / TRAIN.run_images_per_s)


def test_a_step_is_longer_by_what_its_workers_wait_for_each_other() -> None:
    def rate(workers: int, probe: Probe) -> float:
        asked = config(job="train", num_workers=workers, threads_per_worker=1)
        return plan_for(asked, [cpu_nodes(8)], [probe]).forecast.limits["model"]

    # Four wait 60 ms in a step. With 0.9 of the formula, as the measured run has it.
    waiting = dataclasses.replace(TRAIN, waiting_s=0.060, gradient_bytes=0)
    free = dataclasses.replace(TRAIN, gradient_bytes=0)
    assert rate(1, waiting) == rate(1, free) == pytest.approx(0.9 / 0.18)
    assert rate(2, waiting) == pytest.approx(0.9 * 8 / (4 * 0.18 + 0.040))
    assert rate(4, waiting) == pytest.approx(0.9 * 8 / (2 * 0.18 + 0.060))
    assert rate(4, dataclasses.replace(free, waiting_workers=1)) == rate(4, free)


def test_more_workers_a_cpu_come_up_more_slowly() -> None:
    # The measured run had four on four CPUs; each takes 8 CPU seconds.
    assert [
        plan_for(config(num_workers=workers), [cpu_nodes(1, cpus=8)], [CPU]).startup_s for workers in (4, 8, 16)
    ] == pytest.approx([20.0, 20.0, 28.0])
    # On GPU nodes they come up beside no CPU but those of these nodes.
    of_gpu = dataclasses.replace(GPU, worker_startup_cpu_s=8.0, run_workers=1, num_cpus=8)
    dense = plan_for(config(num_workers=4), [cpu_nodes(4), gpu_nodes(1, cpus=8, gpus=4)], [CPU, of_gpu])
    assert dense.startup_s == pytest.approx(20 + (4 / 8 - 1 / 8) * 8)


def test_the_cost_is_that_of_all_nodes_from_start_to_end() -> None:
    groups = [
        dataclasses.replace(cpu_nodes(2), price_per_hour=0.5),
        dataclasses.replace(gpu_nodes(1), price_per_hour=2.0),
    ]
    result = plan_for(config(), groups, [CPU, GPU])
    assert result.cost == pytest.approx(3.0 * result.total_s / 3600)
    assert plan_for(config(), [cpu_nodes(1)], [CPU]).cost is None


def test_the_cluster_file_of_the_project() -> None:
    groups = node_groups(config(cluster=str(PROJECT / "cluster.yaml")))
    # The head offers no CPU; c7i.4xlarge has 16.
    assert groups == (
        NodeGroup(name="decode", num_nodes=16, num_cpus=16),
        NodeGroup(name="model", num_nodes=4, num_cpus=8, num_gpus=1),
    )
    priced = node_groups(
        config(cluster=str(PROJECT / "cluster.yaml"), price_per_cpu_node_hour=0.7, price_per_gpu_node_hour=1.1)
    )
    assert [group.price_per_hour for group in priced] == [0.7, 1.1]


@pytest.mark.parametrize(
    ("instance", "cpus"), [("m7i.large", 2), ("m7i.xlarge", 4), ("g6.2xlarge", 8), ("c7i.24xlarge", 96)]
)
def test_aws_names_tell_the_cpus(tmp_path: Path, instance: str, cpus: int) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "provider: {type: aws}\navailable_node_types:\n"
        f"  work: {{max_workers: 3, resources: {{}}, node_config: {{InstanceType: {instance}}}}}\n"
    )
    assert node_groups(config(cluster=str(path))) == (NodeGroup(name="work", num_nodes=3, num_cpus=cpus),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("just text", "available_node_types"),
        ("available_node_types: {a: {max_workers: 2, resources: {}}}", "CPUs of a node of the group a"),
        ("available_node_types: {a: {max_workers: 0, resources: {CPU: 4}}}", "no group"),
        ("max_workers: 3\navailable_node_types: {a: {max_workers: 4, resources: {CPU: 4}}}", "4 nodes .* 3 "),
        ("a: [", r"cluster\.yaml"),
    ],
)
def test_a_cluster_file_that_says_too_little_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        node_groups(config(cluster=str(path)))
    with pytest.raises(UserError, match=r"none\.yaml"):
        node_groups(config(cluster=str(tmp_path / "none.yaml")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint": None}, "--checkpoint"),
        ({"model": "m"}, "--checkpoint"),
        ({"images": 0}, "--images .*0"),
        ({"image_size": 256}, "--image-size .*--model"),
        ({"epochs": 3}, "--epochs .*--job train"),
        ({"cpu_nodes": 2}, "--cpu-nodes .*--cpus-per-cpu-node"),
        ({"cpus_per_gpu_node": 2}, "--cpus-per-gpu-node .*--gpu-nodes"),
        ({"cluster": "x", "gpu_nodes": 1, "cpus_per_gpu_node": 8}, "--cluster"),
        ({"job": "train", "engine": "openvino"}, "--job train .*--engine torch"),
        ({"engine": "onnx", "gpu_nodes": 1, "cpus_per_gpu_node": 8}, "engine onnx"),
        ({"probe": ["a"], "save_probe": "b"}, "--probe"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(**options)


def test_probes_must_fit_the_job_and_the_cluster() -> None:
    with pytest.raises(UserError, match="different jobs"):
        combine([CPU, TRAIN], needs_gpu=False)
    with pytest.raises(UserError, match="the cluster has GPUs"):
        combine([CPU], needs_gpu=True)
    with pytest.raises(UserError, match="the cluster has no GPU"):
        combine([GPU], needs_gpu=False)
    assert combine([GPU, CPU], needs_gpu=True) == (CPU, GPU)
    assert combine([GPU], needs_gpu=True) == (GPU, GPU)
    with pytest.raises(UserError, match=r"5 workers .* the cluster has 2"):
        plan_for(config(num_workers=5), [gpu_nodes(2)], [CPU, GPU])
    with pytest.raises(UserError, match=r"--batch-size .*8 images .*9 workers"):
        plan_for(config(job="train", num_workers=9), [cpu_nodes(9)], [TRAIN])


def test_the_command_combines_saved_probes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probes = f"{save(tmp_path, 'cpu', CPU)},{save(tmp_path, 'gpu', GPU)}"
    out = tmp_path / "plan.json"
    command = ["plan", "--images", "10_000_000", "--probe", probes, "--cpu-nodes", "8", "--cpus-per-cpu-node", "16"]
    command += ["--gpu-nodes", "2", "--cpus-per-gpu-node", "8", "--price-per-cpu-node-hour", "0.5", "--out", str(out)]
    assert main(command) == 2
    assert "--price-per-gpu-node-hour" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--price-per-gpu-node-hour", "1"]) == 0
    shown = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["num_images"] == 10_000_000 and content["images_per_s"] == pytest.approx(1000)
    assert content["bottleneck"] == "model" and content["cost"] == pytest.approx(6 * (20 + 1e4) / 3600)
    assert Probe.from_dict(content["probes"]["model"], where="plan") == GPU
    for words in (
        "predict of 10,000,000 images on 8 × 16 CPUs (CPU nodes), 2 × 8 CPUs and 1 GPU (GPU nodes)",
        "time: 2 h 47 min, including 20 s start-up; 1,000 images/s",
        "cost: 16.70, 1.67 per million images",
        "bottleneck: model; ",
        "balance: 3.5 CPUs ",
        ": 0.11 such CPU nodes",
        "100.0 MB/s of images; up to 1,000.0 MB/s of pixels",
        "measured machine (a; the model on b)",
        "raydet predict --num-workers 2 --engine torch --batch-size 16 --precision fp32",
    ):
        assert words in shown


def test_a_probe_that_is_none_is_refused(tmp_path: Path) -> None:
    for content, words in (
        ("{", "JSON"),
        ("[]", "not a probe"),
        (json.dumps({"probe_version": PROBE_VERSION, "stages": {}}), "not a complete probe"),
        (json.dumps({**CPU.to_dict(), "probe_version": PROBE_VERSION - 1}), "not a probe"),
        (json.dumps(TRAIN.to_dict()), "train, .*predict"),
    ):
        path = tmp_path / "probe.json"
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            plan(config(probe=[str(path)]))
    with pytest.raises(UserError, match=r"none\.json"):
        plan(config(probe=[str(tmp_path / "none.json")]))


def _stage_job(**options: Any) -> Any:
    from raydet.planning.stages import StageJob

    fixed: dict[str, Any] = {"engine": "torch", "precision": "fp32", "augmentation": "flip"}
    return StageJob(**fixed, threads=1, use_gpu=False, **options)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("job", ["predict", "train"])
def test_stages_are_measured_on_real_images(shapes: Path, tmp_path: Path, job: PlannedJob) -> None:
    from raydet.models.loading import build_detector
    from raydet.planning.stages import StageWork

    table = str(shapes / "train")
    model = "rt_detr_v2_tiny"
    if job == "predict":
        model = str(tmp_path / "checkpoint")
        build_detector("rt_detr_v2_tiny", open_table(table, "images").categories, image_size=64, seed=0).save(model)
    asked = _stage_job(job=job, table=table, model=model, image_size=64, batch_size=4, with_model=True, seconds=0.3)
    found = StageWork(asked).take_turn()
    assert found["num_images"] == 4 * found["num_batches"] > 0 and found["waiting_s"] == 0.0
    stages = {"read", "decode", "model", *(("prepare", "write") if job == "predict" else ())}
    assert set(found["cpu_s"]) == set(found["wall_s"]) == stages
    assert found["cpu_s"]["model"] > 0 and found["pixel_bytes"] == 64 * 64 * 3
    assert (found["gradient_bytes"] > 100_000) == (job == "train")
    if job == "predict":
        without = StageWork(dataclasses.replace(asked, with_model=False)).take_turn()
        assert set(without["cpu_s"]) == {"read", "decode"}


def test_the_midst_of_a_run_is_between_its_first_quarter_and_its_last_images() -> None:
    images = {"decode": [90.0, 0, 30, 0, 0, 0, 0], "model": [0.0, 0, 32, 16, 32, 32, 8], "write": [0.0] * 6 + [120]}
    window = Window.of({"started_unix_s": 1000.0, "span_s": 2.0, "images": images})
    assert window == Window(1006.0, 1012.0, {"decode": 0.0, "model": 80.0, "write": 0.0})
    short = Window.of({"started_unix_s": 0.0, "span_s": 1.0, "images": {"model": [0.0, 0.0, 16.0, 4.0]}})
    assert short == Window(2.0, 4.0, {"model": 20.0})


def test_cpu_seconds_between_two_times_lie_between_those_that_were_read() -> None:
    watched = Watched(3.0, unix_s=[100.0, 101.0, 103.0], cpu_s=[0.0, 2.0, 3.0])
    assert watched.cpu_s_between(100.5, 102.0) == pytest.approx(1.5)
    assert watched.cpu_s_between(99.0, 104.0) == pytest.approx(3.0)


def test_all_processes_of_a_command_are_watched(tmp_path: Path) -> None:
    burn = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
    command = [
        sys.executable,
        "-c",
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n{burn}",
    ]
    watched = run_watched(command, str(tmp_path))
    assert watched.seconds > 1.2
    assert 0.9 < watched.cpu_s_between(watched.unix_s[0], watched.unix_s[-1]) < 1.2 * watched.seconds
    titled = (
        f"import subprocess, sys\nsubprocess.run(['other work', '-c', {burn!r}], executable=sys.executable)\n{burn}"
    )
    watched = run_watched([sys.executable, "-c", titled], str(tmp_path), not_counted="other")
    assert 0.3 < watched.cpu_s_between(watched.unix_s[0], watched.unix_s[-1]) < 0.9
    with pytest.raises(RunError, match="failed: out of luck"):
        run_watched([sys.executable, "-c", "import sys; sys.exit('out of luck')"], str(tmp_path))


def test_pictures_that_are_none_are_a_mistake(shapes: Path, tmp_path: Path) -> None:
    from raydet.planning.stages import StageWork

    table = open_table(str(shapes / "train"), "images")
    rows = table.read().to_pylist()[:3]
    with TableWriter(str(tmp_path / "broken"), table.schema, config_hash="-") as writer:
        writer.write_rows([{**row, "image": {"bytes": b"no picture", "path": "x.jpg"}} for row in rows])
    asked = _stage_job(
        job="predict",
        table=str(tmp_path / "broken"),
        model="",
        image_size=None,
        batch_size=2,
        with_model=False,
        seconds=0.1,
    )
    with pytest.raises(UserError, match="can be decoded"):
        StageWork(asked)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("job", ["predict", "train"])
def test_a_plan_is_measured_here(shapes: Path, tmp_path: Path, job: PlannedJob) -> None:
    asked = PlanConfig(
        images=100_000,
        job=job,
        model="rt_detr_v2_tiny",
        image_size=64,
        data=str(shapes / "train"),
        batch_size=4,
        augmentation="flip",
        use_gpu=False,
        seconds=2.0,
        cpu_nodes=4,
        cpus_per_cpu_node=8,
        save_probe=str(tmp_path / "probe.json"),
        out=str(tmp_path / "plan.json"),
    )
    result: PlanResult = plan(asked)
    probe = result.probes[0]
    assert probe.device == "cpu" and probe.run_images_per_s > 0 and probe.startup_s > 1
    assert 1 < probe.worker_startup_cpu_s < 100 and probe.waiting_workers == (os.cpu_count() or 1)
    assert (probe.waiting_s > 0) == (job == "train" and probe.waiting_workers > 1)
    assert all(cost.cpu_s >= 0 for cost in probe.stages.values()) and probe.stages["model"].cpu_s > 0
    assert result.forecast.images_per_s > 0 and result.total_s > probe.startup_s
    # What was saved gives the same plan without measuring.
    again = plan(dataclasses.replace(asked, probe=[asked.save_probe or ""], save_probe=None, out=None))
    assert again.total_s == pytest.approx(result.total_s)
    assert json.loads((tmp_path / "plan.json").read_text())["total_s"] == pytest.approx(result.total_s)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mistakes_of_the_model_come_back_as_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such checkpoint|holds no model"):
        plan(config(checkpoint=str(tmp_path)))
    with pytest.raises(UserError, match="image_size"):
        plan(config(checkpoint=None, model="rt_detr_v2_tiny", image_size=100, job="train", seconds=1.0))
