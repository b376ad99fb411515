"""bench/torture.py: its short form finds nothing, and what is broken on purpose it does find."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from bench import torture
from bench.checks.rows import Row
from bench.torture_parts import damage
from bench.torture_parts.catalogue import SHARES
from bench.torture_parts.trials import HARMS
from tests.hostile import files, models, names, rows, templates
from tests.making.warm.bench_workers import warm_workers

ROOT = Path(__file__).resolve().parents[2]
CORPUS = (*rows.ITEMS, *files.ITEMS, *names.ITEMS, *models.ITEMS, *templates.ITEMS)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows and what was printed of the short form, with writers that are broken on purpose."""
    out = tmp_path_factory.mktemp("torture") / "torture.json"
    arguments = ["--short", "--parts", ",".join((*SHARES, "broken")), "--out", str(out)]
    printed = io.StringIO()
    with warm_workers(), redirect_stdout(printed):
        code = torture.main(arguments)
    return code, json.loads(out.read_text())["rows"], printed.getvalue()


def test_the_short_form_meets_every_kind_of_fault_and_finds_no_harm(short_run: Any) -> None:
    _, rows, _ = short_run
    sound = [row for row in rows if row["part"] != "broken"]
    assert [row for row in sound if row["outcome"] not in ("passed", "skipped")] == []
    tried = {row["part"] for row in sound if row["figures"].get("trials")}
    skipped = {row["part"] for row in sound if row["outcome"] == "skipped"}
    assert tried | skipped == {*SHARES, "secrets"} - {"leaks"}
    reasons = [row["seen"] for row in sound if row["outcome"] == "skipped"]
    assert all(
        "needs" in reason or "strace may not" in reason or "not in the short" in reason for reason in reasons
    )


@pytest.mark.parametrize("harm", ["doubled", "silently_wrong", "mixed", "tracebacks"])
def test_a_writer_that_is_broken_on_purpose_is_noticed(short_run: Any, harm: str) -> None:
    code, rows, printed = short_run
    (row,) = [row for row in rows if (row["part"], row["check"]) == ("broken", harm)]
    assert code == 1
    assert row["outcome"] == "failed" and row["figures"][harm] > 0
    assert "| broken | 4 |" in printed


def test_the_script_names_the_parts_there_are() -> None:
    command = [sys.executable, str(ROOT / "bench/torture.py"), "--parts", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"no part 'nonsense'; there are {', '.join(SHARES)}" in done.stderr


@pytest.mark.parametrize("harm", HARMS)
def test_any_harm_and_any_part_that_did_not_run_is_no_clean_end(harm: str) -> None:
    clean = [Row("a", "passed", "", {"trials": 3, harm: 0}), Row("b", "skipped", "needs strace")]
    assert torture.is_clean(clean)
    assert not torture.is_clean([*clean, Row("c", "passed", "", {harm: 1})])
    assert not torture.is_clean([*clean, Row("c", "not run", "time")])


def test_the_table_sums_the_rows_of_a_part_and_of_all() -> None:
    rows = [
        Row("one", "passed", "x", {"trials": 3, "faults": 4, "lost": 0}, part="kills"),
        Row("two", "failed", "a|b", {"trials": 2, "faults": 2, "lost": 1}, part="kills"),
        Row("three", "passed", "", {"trials": 1, "faults": 1, "lost": 0}, part="soak"),
    ]
    head, _, kills, _, everything = torture.table(rows)
    assert head.startswith(
        "| part | trials | faults | lost | doubled | mixed | silently wrong | tracebacks | hung |"
    )
    assert kills.startswith("| kills | 5 | 6 | 1 | 0 ") and kills.endswith("one: x; two: failed: a/b |")
    assert everything.startswith("| all | 6 | 7 | 1 | 0 ")


def test_every_item_of_the_corpus_has_a_name_of_its_own() -> None:
    assert len({item.name for item in CORPUS}) == len(CORPUS) > 150


@pytest.mark.parametrize("kept", damage.DAMAGES)
def test_a_file_that_the_table_of_damages_does_not_know_has_no_outcome(kept: str) -> None:
    assert damage.outcome_of("half a run", "runs/run/ledger.jsonl", kept) is not None
    assert damage.outcome_of("half a run", "runs/run/unheard-of.json", kept) is None
