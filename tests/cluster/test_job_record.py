"""The record of a job's ids, nodes and versions."""

import dataclasses
import json
from pathlib import Path

import pytest

from raydet.cluster.job_record import JobRecord
from raydet.cluster.shares import Resources

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
RESOURCES = Resources(num_gpus=0, use_gpu=False, cpus_per_worker=0.5)


def test_a_submitted_job_is_named_and_nothing_else_of_it(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {
        "job_submission_id": "raysubmit_1",
        "job_name": "nightly",
        "git_commit": "0a1b2c3",
        "password": "hunter2",
    }
    job = {"runtime_env": {"env_vars": {"SOME_KEY": "hunter2"}}, "metadata": metadata}
    monkeypatch.setenv(JOB_VARIABLE, json.dumps(job))
    record = dataclasses.asdict(JobRecord.of_this_job(num_workers=2, resources=RESOURCES))
    assert record["submission_id"] == "raysubmit_1" and record["commit"] == "0a1b2c3"
    assert (record["num_workers"], record["use_gpu"]) == (2, False)
    assert record["num_nodes"] == 1 and record["nodes"][0]["count"] == 1 and record["nodes"][0]["num_cpus"] == 2
    assert {"raydet", "ray", "torch", "python"} <= record["versions"].keys()
    assert "hunter2" not in json.dumps(record)


@pytest.mark.parametrize(
    "content", ["", "no JSON", "[]", '{"metadata": null}', '{"metadata": {"commit": "my password"}}']
)
def test_what_is_no_commit_is_not_taken_for_one(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv(JOB_VARIABLE, content)
    record = JobRecord.of_this_job(num_workers=2, resources=RESOURCES)
    assert record.submission_id is None and record.commit is None


def test_nodes_that_join_later_are_recorded(ray_cluster: None, tmp_path: Path) -> None:
    record = JobRecord.of_this_job(num_workers=2, resources=RESOURCES)
    assert record.with_joined_nodes() == record
    before = dataclasses.replace(record, num_nodes=0, nodes=[])
    before.write(str(tmp_path))
    before.with_joined_nodes().write(str(tmp_path))
    content = json.loads((tmp_path / ".job.json").read_text())
    assert content == {"job": dataclasses.asdict(record), "earlier_jobs": []}


def test_a_run_keeps_the_jobs_that_it_resumes_from(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second", "third"):
        monkeypatch.setenv(JOB_VARIABLE, json.dumps({"metadata": {"job_submission_id": name}}))
        JobRecord.of_this_job(num_workers=2, resources=RESOURCES).write(str(tmp_path))
    content = json.loads((tmp_path / ".job.json").read_text())
    assert content["job"]["submission_id"] == "third"
    assert [job["submission_id"] for job in content["earlier_jobs"]] == ["first", "second"]
