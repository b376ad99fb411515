"""Writers that are broken on purpose; not run unless named. tests/bench/test_torture.py sees that each is noticed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from bench.checks.rows import Bench, Row
from bench.torture_parts.stage import Stage
from bench.torture_parts.trials import Tally, command

PART = "broken"


def check(bench: Bench, share: float) -> Iterator[Row]:
    """Let each broken writer do a work once; each row must fail in the way that its name says."""
    stage = Stage(bench.folder / "stage")
    broken: dict[str, tuple[str, Callable[[], object]]] = {
        "doubled": ("infer", _doubles_lines), "silently_wrong": ("infer", _changes_answers),
        "mixed": ("promote", _forgets_history), "tracebacks": ("evaluate", _raises),
    }  # fmt: skip
    for harm, (name, break_it) in broken.items():
        work = stage.works[name]
        stage.expected(work)
        place = stage.fresh(work)
        tally = Tally(PART, harm)
        ended = command(functools.partial(work.act, place), stage.log_path, before=break_it)
        tally.count(stage.after(work, ended), what=name)
        yield tally.row("was not noticed")


def _doubles_lines() -> None:
    from tasks.core.runs.ledger import Ledger

    append: Callable[..., Any] = Ledger.append_line

    def twice(ledger: Ledger, record: dict[str, Any]) -> int:
        offset: int = append(ledger, record)
        append(ledger, record)
        return offset

    Ledger.append_line = twice  # type: ignore[method-assign, assignment]


def _changes_answers() -> None:
    from tasks.core.runs import published

    plain: Callable[..., dict[str, Any]] = published._prediction

    def changed(*arguments: Any) -> dict[str, Any]:
        row = plain(*arguments)
        return {**row, "predicted_answer": row["predicted_answer"] + " "}

    published._prediction = changed  # type: ignore[assignment]


def _forgets_history() -> None:
    from tasks.core.models.trained.alias_files import HISTORY_NAME
    from tasks.promoter import Promoter

    plain = Promoter.promote

    def forgetful(promoter: Promoter, *arguments: Any, **options: Any) -> Any:
        promoted = plain(promoter, *arguments, **options)
        path = promoter.models_dir / HISTORY_NAME
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
        return promoted

    Promoter.promote = forgetful  # type: ignore[method-assign, assignment]


def _raises() -> None:
    from tasks.evaluator import Evaluator

    def fail(_: Evaluator) -> None:
        raise KeyError("a mistake of ours")

    Evaluator.score = fail  # type: ignore[assignment, method-assign]
