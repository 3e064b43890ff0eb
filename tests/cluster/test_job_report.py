"""The sums of a run do not depend on the order of its files, and the table names the bottleneck."""

import json
import math
import random
import re
from dataclasses import asdict
from typing import Any

import pytest

from raydet.cluster.job_record import JobRecord, NodeKind, versions
from raydet.cluster.job_report import OTHER, JobReport, JobStats, error_kind
from raydet.cluster.stopwatch import STAGES, FileStats, ProcessStats
from raydet.cluster.timeline import MOST_SPANS, Timeline, steady_rate


def process(kind: str, pid: int, mb: float = 100.0, *, at_s: float = 10.0, node: str = "n1", **seconds: float) -> Any:
    return ProcessStats(node=node, pid=pid, thread=pid, kind=kind, seconds=seconds, resident_mb=mb, ended_unix_s=at_s)


def file(num_images: int = 100, errors: tuple[str, ...] = (), *processes: ProcessStats) -> FileStats:
    return FileStats(
        file="part-0000000.parquet",
        num_images=num_images,
        num_detections=7,
        errors=list(errors),
        processes=list(processes),
    )


def job(started_s: float, *files: FileStats, monkeypatch: pytest.MonkeyPatch) -> JobStats:
    """Build the sums of a run that started at a known time."""
    monkeypatch.setattr("raydet.cluster.job_report.time.time", lambda: started_s)
    stats = JobStats()
    for item in files:
        stats.add(item)
    return stats


def report_of(stats: JobStats, *, num_nodes: int = 1, **changes: Any) -> JobReport:
    where = JobRecord(
        ray_job_id="01",
        submission_id=None,
        commit=None,
        started="",
        num_workers=2,
        use_gpu=False,
        num_nodes=num_nodes,
        nodes=[NodeKind(num_nodes, 4.0, 0.0, None, 8)],
        versions=versions(),
    )
    return stats.finish(**{"wall_s": 110.0, "num_model_workers": 2, "job": where, **changes})


def finished(stats: JobStats, **changes: Any) -> dict[str, Any]:
    """Return the content of `.job.json`."""
    content = asdict(report_of(stats, **changes))
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    return content


FILES = (
    file(
        100,
        ("empty file",),
        process("decoder", 2, 200, read=5.0, decode=20.0, prepare=10.0),
        process("model", 9, 900, at_s=15.0, model=5.0),
        process("model", 9, 1000, at_s=90.0, model=75.0),
        process("writer", 2, 150, write=2.0),
    ),
    file(
        300,
        (),
        process("decoder", 3, 300, decode=20.0, prepare=10.0),
        process("model", 9, 800, at_s=95.0, node="n2", model=80.0),
    ),
)


def test_images_by_stage_and_second(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = finished(job(5.0, *FILES, monkeypatch=monkeypatch))["timeline"]
    assert (timeline["started_unix_s"], timeline["span_s"], set(timeline["images"])) == (
        5.0,
        0.5,
        set(STAGES),
    )
    counts = timeline["images"]
    assert {len(values) for values in counts.values()} == {181}
    # Two parts of one file, and the only part of another.
    assert {second: images for second, images in enumerate(counts["model"]) if images} == {20: 50, 170: 50, 180: 300}
    assert counts["decode"][10] == sum(counts["decode"]) == 400


def test_a_long_run_has_no_more_spans_than_a_short_one() -> None:
    timeline = Timeline(100.0)
    for second in range(10_000):
        timeline.add("model", 100.0 + second, 2)
    timeline.add("write", 90.0, 5)
    content = timeline.to_dict()
    assert content["span_s"] == 64.0 and len(content["images"]["model"]) == math.ceil(10_000 / 64) <= MOST_SPANS
    assert content["images"]["model"][:-1] == [128.0] * 156 and sum(content["images"]["model"]) == 20_000
    assert content["images"]["write"] == [5.0] + [0.0] * 156


@pytest.mark.parametrize("size", [1, 16, 250])
def test_the_steady_rate_does_not_depend_on_the_size_of_the_blocks(size: int) -> None:
    """40 s of start-up, 1,000 images decoded ahead, then 50 images/s, and a slow end."""
    timeline = Timeline(0.0)
    for number in range(1, 5000 // size + 1):
        done = number * size
        late_s = max(0.0, done - 4700) / 10
        timeline.add("model", 40.0 + max(0.0, done - 1000) / 50 + late_s, size)
    rate, seconds = steady_rate(timeline.to_dict()) or (0.0, 0.0)
    assert rate == pytest.approx(50, rel=0.05) and seconds > 60


@pytest.mark.parametrize("images", [{}, {"model": []}, {"model": [0.0, 16.0]}])
def test_a_run_that_is_too_short_has_no_steady_rate(images: dict[str, list[float]]) -> None:
    assert steady_rate({"span_s": 0.5, "images": images}) is None


def test_sums_rates_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    report = finished(job(0.0, *FILES, monkeypatch=monkeypatch), num_nodes=3, price_per_node_hour=2.0, config_hash="ab")
    assert (report["num_images"], report["num_detections"], report["errors"]) == (400, 14, {"empty file": 1})
    # The first model started at 15 s - 5 s of work; 100 s remain, for two workers.
    assert (report["startup_s"], report["images_per_s_after_startup"]) == (10.0, 4.0)
    assert report["images_per_s"] == pytest.approx(400 / 110)
    assert report["model_busy_share"] == pytest.approx(160 / 200)
    stages = report["stages"]
    assert list(stages) == list(STAGES)
    assert stages["decode"] == {
        "busy_s": 40.0,
        "num_processes": 2,
        "busy_share": 0.2,
        "images_per_s_of_one": 10.0,
        "images_per_s_at_most": 20.0,
    }
    assert (stages["model"]["num_processes"], stages["prepare"]["busy_s"]) == (2, 20.0)
    assert report["cost_per_million_images"] == pytest.approx(2.0 * 3 * 110 / 3600 / 400 * 1e6)
    assert report["config_hash"] == "ab" and {"raydet", "python", "torch"} <= set(report["versions"])


def test_memory_counts_each_process_once_with_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    report = finished(job(0.0, *FILES, monkeypatch=monkeypatch))
    # Process 2 decodes and writes; process 9 on the other node is a different process.
    assert report["peak_mb_by_kind"] == {"decoder": 500, "model": 1800, "writer": 150}
    assert (report["peak_mb"], report["peak_mb_of_one"], report["num_processes"]) == (2300, 1000, 4)


def test_the_order_of_the_files_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        file(1, (f"reason {'abcdefgh'[number % 8]}",) * (number % 3), process("model", number, model=0.25, at_s=5.0))
        for number in range(50)
    ]
    expected = finished(job(0.0, *files, monkeypatch=monkeypatch))
    random.Random(0).shuffle(files)
    assert finished(job(0.0, *files, monkeypatch=monkeypatch)) == expected


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("empty file", "empty file"),
        ("201 Mpx is over the limit of 1,179 Mpx", "N Mpx is over the limit of N Mpx"),
        ("cannot read s3://bucket/a/b.jpg: not found", "cannot read …: not found"),
        ("no member day/1.jpg, day/2.jpg; n/a", "no member …, …; n/a"),
        ("no such file: /data/a b/1.jpg", "no such file: … …"),
        ("no member 'cats/1.jpg' in it", "no member … in it"),
        ("broken PNG: bad chunk at 0x7f3a, byte 12.", "broken PNG: bad chunk at N, byte N."),
        ("a JPEG2000 file and/or a\nPDF", "a JPEG2000 file and/or a PDF"),
    ],
)
def test_a_reason_loses_what_is_of_one_file_alone(reason: str, kind: str) -> None:
    assert error_kind(reason) == kind
    assert len(error_kind("word " * 100)) <= 100


def test_at_most_twenty_reasons_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [a + b + c for a in "abcdefghijkl" for b in "abcdefghijkl" for c in "abcdefghijkl"]
    errors = tuple(words) + ("empty file",) * 5 + tuple(f"no such file: /x/{number}.jpg" for number in range(9))
    report = finished(job(0.0, file(5000, errors), monkeypatch=monkeypatch))
    assert report["num_errors"] == len(errors) == sum(report["errors"].values())
    assert list(report["errors"].items())[:2] == [("no such file: …", 9), ("empty file", 5)]
    assert len(report["errors"]) == 21 and list(report["errors"])[-1] == OTHER
    assert report["errors"][OTHER] == len(words) - 18


@pytest.mark.parametrize(
    ("busy", "bottleneck", "words"),
    [
        ({"model": 170.0, "decode": 99.0}, "model", "model is the bottleneck.* 85% .*--num-workers"),
        ({"model": 60.0, "decode": 95.0}, "decode", "decode is the bottleneck.* 95% .*30%.*--cpus-per-worker"),
        ({"model": 60.0, "read": 90.0, "decode": 40.0}, "read", "read is the bottleneck.*large files"),
        ({"model": 60.0, "prepare": 85.0}, "prepare", "prepare is the bottleneck.* 85%"),
        ({"model": 60.0, "write": 80.0}, "write", "write is the bottleneck.*faster storage"),
        ({"model": 60.0, "decode": 30.0}, None, "no .*bottleneck.* 30%"),
    ],
)
def test_the_last_line_names_the_bottleneck(
    busy: dict[str, float], bottleneck: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"read": "decoder", "decode": "decoder", "prepare": "decoder", "model": "model", "write": "writer"}
    processes = [
        ProcessStats(
            node="n1",
            pid=1,
            thread=1,
            kind=kinds[stage],
            seconds={stage: seconds},
            resident_mb=9.0,
            ended_unix_s=10 + seconds,
        )
        for stage, seconds in busy.items()
    ]
    report = report_of(job(0.0, file(100, (), *processes), monkeypatch=monkeypatch))
    assert report.bottleneck == bottleneck
    assert re.search(words, report.lines()[-1])


def test_a_run_of_mostly_start_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    late = file(100, (), process("model", 1, at_s=100.0, model=10.0))
    report = report_of(job(0.0, late, monkeypatch=monkeypatch))
    assert (report.startup_s, report.bottleneck) == (90.0, "startup")
    assert "start-up" in report.lines()[-1]
    # A machine whose clock is behind must not produce a negative time.
    assert finished(job(1000.0, late, monkeypatch=monkeypatch))["startup_s"] == 0.0


def test_a_run_without_images_has_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(job(0.0, monkeypatch=monkeypatch), price_per_node_hour=1.0, error="out of memory")
    assert (report.num_images, report.images_per_s, report.cost_per_million_images) == (0, 0.0, None)
    assert (report.error, report.startup_s, report.model_busy_share) == ("out of memory", 110.0, None)
    assert "no image" in report.lines()[-1]
    assert finished(job(0.0, monkeypatch=monkeypatch), wall_s=0.0)["images_per_s"] is None


def test_earlier_runs_are_kept_first_to_last(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[JobReport] = []
    for number in range(3):
        stats = job(0.0, file(10 + number), monkeypatch=monkeypatch)
        error = "killed" if number == 0 else None
        earlier = asdict(reports[-1]) if reports else None
        reports.append(report_of(stats, wall_s=60.0, earlier=earlier, error=error))
    assert [run["num_images"] for run in reports[-1].earlier_runs] == [10, 11]
    assert [run["error"] for run in reports[-1].earlier_runs] == ["killed", None]
    assert any(re.search("2 earlier runs: 33 images in 3 min 0 s", line) for line in reports[-1].lines())
    assert any(re.search("1 earlier run: 21 images in 2 min 0 s", line) for line in reports[-2].lines())
    others: list[Any] = [{}, [], "x", {"earlier_runs": 3, "num_images": "1"}, {"earlier_runs": [None], "num_images": 1}]
    for foreign in others:
        assert report_of(stats, wall_s=1.0, earlier=foreign).earlier_runs == []


def test_the_table_is_short_and_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = tuple("abcde") * 3 + ("empty file",) * 4
    stats = job(0.0, *FILES, file(20_000, errors), monkeypatch=monkeypatch)
    earlier = finished(job(0.0, file(5), monkeypatch=monkeypatch))
    lines = report_of(stats, price_per_node_hour=3.5, earlier=earlier, wall_s=7500.0).lines()
    assert len(lines) <= 12 and all("\n" not in line for line in lines)
    assert re.match(r"20,400 images in 2 h 5 min, .*10\.0 s.*: 2\.72 images/s", lines[0])
    assert lines[2].startswith("20 ") and lines[2].endswith(": 5 empty file; 3 a; 3 b; 9 others")
    table = lines[3:9]
    assert [line.split()[0] for line in table] == ["stage", *STAGES]
    assert len({len(line) for line in table}) == 1
    assert lines[9] == "memory: at most 2.2 GB in 4 processes (decoder 500 MB, model 1.8 GB, writer 150 MB)"
    assert re.match(r"cost: 357\.43 per million images .*1 node at 3\.5", lines[10])
