"""`tuneproof judge`: what a judge's calibration shows, in a table and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from flows.cli.console import say, show_table
from flows.cli.options import NO_COMMON, ConfigPath, Settings
from flows.cli.starting import prepare
from tasks.core.errors import ConfigError

if TYPE_CHECKING:
    from tasks.core.config import Config
    from tasks.core.evaluation.calibrating import Calibrated

_MOST_SHOWN = 10

judge = App(name="judge", help="Compare the judge model with people.", help_format="plaintext")


@judge.command
def calibrate(
    labels: Path,
    config: ConfigPath = None,
    /,
    *,
    metric: Annotated[str | None, Parameter(help="Judged metric of rows that name none.")] = None,
    out: Annotated[
        Path | None, Parameter(help="HTML page to write; LABELS.calibration.html if not given.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Compare the judge with the labels of people; what it shows is kept, and a gate asks for it.

    LABELS is a file of JSON lines; see docs/judge.md.
    """
    calibrate_by(labels, prepare(config, NO_COMMON, settings), metric=metric, page_path=out)


def calibrate_by(labels_path: Path, config: Config, *, metric: str | None, page_path: Path | None) -> None:
    """Judge labelled rows, print and write how far judge and people agree, and keep it for the gate."""
    from tasks.core.evaluation.calibrating import calibrate as compare_with_people
    from tasks.core.metrics.judge.calibration import CalibrationBook, standing_of
    from tasks.core.metrics.judge.labels import read_labels
    from tasks.core.metrics.models.scoring_models import ScoringModels
    from tasks.core.report.calibration_page import write_calibration
    from tasks.server.secret_blocks import judge_key_of

    chosen = config.evaluator
    only = chosen.judged_metrics[0] if len(chosen.judged_metrics) == 1 else None
    labels = read_labels(labels_path, metric or only)
    if chosen.llm is None:
        raise ConfigError("no judge model is set", "set llm in [evaluator]; see docs/judge.md")
    settings = chosen.model_copy(update={"metrics": tuple(labels.rows)})
    models = ScoringModels(settings, api_key=judge_key_of(settings))
    models.check()
    try:
        found = compare_with_people(labels, models)
    finally:
        models.close()
    book = CalibrationBook.of(settings)
    book.add(one.record for one in found)
    page = page_path or labels_path.with_suffix(".calibration.html")
    standings = [
        standing_of(
            one.record.metric,
            one.record.judge,
            one.record.prompt_sha256,
            [one.record],
            settings.judge_minimum_kappa,
        )
        for one in found
    ]
    write_calibration(page, found, standings, str(labels_path))
    for one, standing in zip(found, standings, strict=True):
        _show(one)
        if (top := labels.rated.get(one.record.metric)) is not None:
            *shares, last = (f"{rating / top:g}" for rating in range(top + 1))
            ratings = ", ".join(map(str, range(top + 1)))
            say(f"The labels are read as ratings {ratings}, that is {', '.join(shares)} and {last}.")
        say(f"{'may' if standing.may_decide else 'may not'} decide a gate. {standing.told}")
    say(f"kept: {book.address}")
    say(f"page: {page.resolve()}")


def _show(found: Calibrated) -> None:
    from tasks.core.report.calibration_page import figures

    record = found.record
    show_table(
        f"{record.metric}: {record.model} against people, {record.rows} rows",
        ["figure", "value"],
        [[name, f"{value} {note}".strip()] for name, value, note in figures(found)],
    )
    rows = zip(found.classes, found.confusion, strict=True)
    show_table(
        "people (lines) and judge (columns)",
        ["", *found.classes],
        [[name, *map(str, counts)] for name, counts in rows],
    )
    for one in found.differing[:_MOST_SHOWN]:
        question = " ".join(one.row.question.split())[:80]
        say(f"  line {one.row.line}: person {one.row.label:g}, judge {one.judged:.2g}: {question}")
    if len(found.differing) > _MOST_SHOWN:
        say(f"  and {len(found.differing) - _MOST_SHOWN} more; the page shows all.")
