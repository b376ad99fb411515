"""Which run is evaluated when none is named."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.core.evaluation.run_lookup import newest_run
from tasks.core.generation.run_dir import RunDir
from tests.evaluation_runs import sums, write_run


def test_runs_that_only_serve_a_comparison_are_passed_over_for_the_newest(tmp_path: Path) -> None:
    runs_dir, later, rows = tmp_path / "runs", "2026-01-03T00:00:00+00:00", sums(4, 2)
    write_run(runs_dir / "tuned", rows, adapter="b" * 64)
    write_run(runs_dir / "base", rows, finished_at=later)
    probe = write_run(tmp_path / "probe", rows, adapter="9" * 64)
    key = RunDir(probe).read_manifest().run_key
    write_run(runs_dir / f"champion-sums-{key[:8]}", rows, adapter="9" * 64, finished_at=later)
    assert newest_run(runs_dir, None).name == "tuned"
    shutil.rmtree(runs_dir / "tuned")
    write_run(runs_dir / "other-model", rows, weights="f" * 64)
    assert newest_run(runs_dir, None).name == "other-model"


def test_where_every_run_serves_a_comparison_the_newest_is_taken(tmp_path: Path) -> None:
    rows = sums(4, 2)
    key = RunDir(write_run(tmp_path / "probe", rows)).read_manifest().run_key
    write_run(tmp_path / "runs" / f"base-sums-{key[:8]}", rows)
    assert newest_run(tmp_path / "runs", "sums.jsonl").name == f"base-sums-{key[:8]}"
