"""Metrics that a node's agent exports while raydet runs, scraped as Prometheus would."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.small_sets import tiny_training

SCRIPT = """
    import json, sys, tempfile, time, urllib.request
    import ray
    from prometheus_client.parser import text_string_to_metric_families
    from raydet import PredictConfig, TrainConfig, predict, train
    from raydet.cluster import job_metrics, session

    def scrape():
        node, = ray.nodes()
        text = urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10).read()
        families = list(text_string_to_metric_families(text.decode()))
        return [sample for family in families for sample in family.samples if "raydet_" in sample.name]

    def wait_for(is_there):
        deadline = time.monotonic() + 60
        while not is_there(samples := scrape()):
            assert time.monotonic() < deadline, samples
            time.sleep(0.5)
        return [[sample.name, dict(sample.labels), sample.value] for sample in samples]

    def total(samples, name, **labels):
        chosen = [sample for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
        return sum(sample.value for sample in chosen)

    class Teller:
        def tell(self):  # the actor stays alive, because gauges disappear with their worker
            job_metrics.step_finished(3, 1.5)
            job_metrics.epoch_validated(0.25)

    train_config, predict_config = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as log, session.session(log):
        train(TrainConfig(**train_config))
        trained = wait_for(lambda samples: total(samples, "ray_raydet_train_images_total") >= 24)
        teller = ray.remote(num_cpus=0)(Teller).remote()
        ray.get(teller.tell.remote())
        told = wait_for(lambda samples: total(samples, "ray_raydet_epoch_ap") == 0.25)
        predict(PredictConfig(**predict_config))
        written = lambda samples: total(samples, "ray_raydet_images_total", stage="write") == 11
        print(json.dumps([trained, told, wait_for(written)]))
"""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_numbers_of_a_run_are_exported(shapes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(10):
        (images / f"{number}.ppm").write_bytes(b"P6 64 64 255 " + bytes(64 * 64 * 3))
    (images / "damaged.jpg").write_bytes(b"no picture")
    train = tiny_training(shapes, out=str(tmp_path / "run"), epochs=2)
    predict = {"checkpoint": f"{tmp_path}/run/checkpoint", "data": str(images), "out": str(tmp_path / "detections")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps([train, predict])],
        env={**os.environ, "RAY_metrics_report_interval_ms": "1000"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trained, told, predicted = json.loads(done.stdout.strip().splitlines()[-1])
    assert 24 <= sum(value for name, _, value in trained if name == "ray_raydet_train_images_total") <= 48
    by_name = {name: value for name, _, value in told}
    assert by_name["ray_raydet_train_epoch"] == 3 and by_name["ray_raydet_train_loss"] == 1.5
    by_stage = {(name, labels.get("stage")): value for name, labels, value in predicted}
    assert by_stage["ray_raydet_images_total", "read"] == 11
    assert by_stage["ray_raydet_images_total", "decode"] == 11
    assert by_stage["ray_raydet_image_errors_total", None] == 1
    assert by_stage["ray_raydet_busy_seconds_total", "decode"] > 0
    job_labels = {labels["job_id"] for _, labels, _ in [*trained, *told, *predicted]}
    assert len(job_labels) == 1 and len(job_labels.pop()) == 8
