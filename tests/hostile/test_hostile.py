"""Strangers' files and wrong options neither hang, crash or mislead raydet, nor lead it outside of what was named."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from raydet.cli.main import main
from tests.hostile import base, corpus
from tests.hostile.__main__ import summary
from tests.hostile.case import Case, Scene
from tests.hostile.judge import Ended, Verdict, judge, snapshot

PROJECT = Path(__file__).parents[2]
NUM_REPRESENTATIVE = 50
SHARE = 3
"""One of this many cases runs, always the same ones, so that they take 40 minutes; `--share 1` runs all."""
_ONLY_IN_A_CHILD = ("web", "options", "pictures")
"""Kinds of which some need limits, or processes beside them."""


def representative() -> list[Case]:
    """Return cases that need neither limits nor a model, of as many kinds and formats as possible; always the same."""
    cases = [case for case in corpus.all_cases(None) if case.weight == "light" and case.rights == "all"]
    cases = [case for case in cases if case.kind not in _ONLY_IN_A_CHILD and "growing" not in case.thing]
    cases = [case for case in cases if not any(unit in case.thing for unit in (" MB", " GB", "10^", "million"))]
    cases.sort(key=lambda case: hashlib.sha256(case.name.encode()).digest())
    taken: Counter[tuple[str, str]] = Counter()
    rank = {}
    for case in cases:
        rank[case.name] = taken[case.kind, case.format]
        taken[case.kind, case.format] += 1
    return sorted(cases, key=lambda case: rank[case.name])[:NUM_REPRESENTATIVE]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data sets and tables."""
    folder = tmp_path_factory.mktemp("good")
    base.make(folder)
    return folder


@pytest.mark.parametrize("case", representative(), ids=lambda case: case.name)
def test_representative_cases(
    case: Case, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(tmp_path / "case", good)
    command = case.build(scene)
    assert not scene.beside
    monkeypatch.chdir(scene.here)
    monkeypatch.setenv("HOME", str(scene.home))
    monkeypatch.setattr(tempfile, "tempdir", str(scene.temporary))
    before = snapshot(scene)
    capfd.readouterr()
    code = main(command)
    stdout, stderr = (text.encode("utf-8", "surrogateescape") for text in capfd.readouterr())
    verdict = judge(case, scene, before, Ended(code, stdout, stderr), command)
    assert verdict.faults == [], verdict.stdout + verdict.stderr


@pytest.mark.hostile
@pytest.mark.timeout(3600)
def test_every_third_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = PROJECT / "runs" / "hostile" / "verdicts.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "tests.hostile", "--share", str(SHARE), "--out", str(out)]
    subprocess.run(command, cwd=PROJECT, env=environment, check=False, stdout=subprocess.DEVNULL)
    verdicts = [Verdict(**json.loads(line)) for line in out.read_text().splitlines()]
    by_kind = summary(verdicts, num_columns=1)
    (out.parent / "summary.md").write_text(f"{by_kind}\n\n{summary(verdicts)}\n")
    with capsys.disabled():
        print(f"\n{by_kind}")
    assert len(verdicts) >= 3_000
    flagged = {verdict.name: verdict.faults for verdict in verdicts if verdict.faults}
    assert flagged == {}


def test_few_cases_start_ray() -> None:
    assert sum(case.weight == "ray" for case in corpus.all_cases(None)) <= 100
