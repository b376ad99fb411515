"""`evaluator_output_detailed.xlsx`: scores, rows and settings for people with a spreadsheet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.evaluation.summary import EvaluationSummary, MetricComparison, MetricSummary
from tasks.core.evaluation.wording import setting_rows
from tasks.core.files import failed_write, replacing, temporary_folder
from tasks.core.report.row_view import Answer, RowView

if TYPE_CHECKING:
    from xlsxwriter.worksheet import Worksheet

CELL_LIMIT = 32_767
CUT_MARK = " [cut: a cell holds 32,767 characters]"
ROW_LIMIT = 1_048_575

# XML 1.0 allows tab, line feed and carriage return of the control characters, and no surrogates.
_ILLEGAL_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

Cell = str | float | int | bool | None

_SCORE_HEADER = (
    "metric", "direction", "aggregate", "candidate", "candidate low", "candidate high", "baseline",
    "baseline low", "baseline high", "difference", "difference low", "difference high", "p value",
    "p value (Holm)", "p value method", "wins", "ties", "losses", "rows", "unscored", "minimum detectable",
)  # fmt: skip
_ROW_HEADER = (
    "id", "question", "system prompt", "reference",
    "candidate answer", "candidate error", "candidate cut", "candidate tokens", "candidate thoughts",
    "candidate cut in thoughts", "candidate tokens of thoughts",
    "baseline answer", "baseline error", "baseline cut", "baseline tokens", "baseline thoughts",
    "baseline cut in thoughts", "baseline tokens of thoughts",
)  # fmt: skip


def safe_text(text: str) -> str:
    """Text that a cell can hold: characters XML forbids become a replacement mark, long text is cut."""
    clean = _ILLEGAL_IN_XML.sub("\ufffd", text)
    # Excel counts UTF-16 units, so a character beyond the basic plane is two.
    if len(clean.encode("utf-16-le")) <= 2 * CELL_LIMIT:
        return clean
    kept = clean.encode("utf-16-le")[: 2 * (CELL_LIMIT - len(CUT_MARK))].decode("utf-16-le", "ignore")
    return kept + CUT_MARK


def write_spreadsheet(path: Path, summary: EvaluationSummary, rows: Iterable[RowView]) -> None:
    """Write the workbook whole or not at all, row by row with constant memory.

    Texts are never read as formulas or links. Raises StorageError when the disk is full.
    """
    import xlsxwriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial_path, temporary_folder(path) as folder, _Sink(partial_path, "w") as sink:
        options = {
            "constant_memory": True,
            "strings_to_formulas": False,
            "strings_to_urls": False,
            "strings_to_numbers": False,
            "tmpdir": str(folder),
        }
        try:
            with xlsxwriter.Workbook(sink, options) as workbook:
                bold = workbook.add_format({"bold": True})
                _write_sheet(workbook.add_worksheet("scores"), _SCORE_HEADER, _score_rows(summary), bold)
                names = [metric.name for metric in summary.candidate.metrics]
                header = (*_ROW_HEADER, *names, *(f"baseline {name}" for name in names))
                _write_sheet(workbook.add_worksheet("rows"), header, _row_cells(rows, names), bold)
                _write_sheet(
                    workbook.add_worksheet("settings"), ("setting", "value"), setting_rows(summary), bold
                )
        except xlsxwriter.exceptions.FileCreateError as error:
            raise failed_write(error.__context__ or error) or OSError(str(error)) from error
        if sink.failure is not None:
            raise sink.failure


class _Sink(io.FileIO):
    """A file that takes everything and keeps the first error as `failure`.

    zipfile writes once more from its finaliser, where Python can only print what goes wrong.
    """

    failure: OSError | None = None

    def write(self, content: Any, /) -> int:
        """Write all, if nothing failed before; tell of all as written."""
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while left and self.failure is None and not self.closed:
                left = left[super().write(left) :]
        except OSError as error:
            self.failure = error
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """The place, if the file is open."""
        return 0 if self.closed else super().seek(offset, whence)

    def tell(self) -> int:
        """The place, if the file is open."""
        return 0 if self.closed else super().tell()

    def flush(self) -> None:
        """Nothing waits."""


def _write_sheet(sheet: Worksheet, header: Sequence[str], rows: Iterable[Sequence[Cell]], bold: Any) -> None:
    sheet.freeze_panes(1, 1)
    sheet.set_column(0, len(header) - 1, 18)
    for column, title in enumerate(header):
        sheet.write_string(0, column, title, bold)
    for number, cells in enumerate(rows, start=1):
        if number > ROW_LIMIT:
            break
        for column, cell in enumerate(cells):
            if isinstance(cell, str):
                sheet.write_string(number, column, safe_text(cell))
            elif isinstance(cell, bool):
                sheet.write_boolean(number, column, cell)
            elif cell is not None:
                sheet.write_number(number, column, cell)


def _score_rows(summary: EvaluationSummary) -> Iterable[Sequence[Cell]]:
    for metric in summary.candidate.metrics:
        baseline = summary.baseline.metric(metric.name) if summary.baseline else None
        compared = summary.comparison.metric(metric.name) if summary.comparison else None
        yield (
            metric.name,
            metric.direction,
            metric.aggregate,
            *_figure(metric),
            *_figure(baseline),
            *_comparison_cells(compared),
            metric.scored_rows,
            metric.unscored_rows,
            compared.minimum_detectable_effect if compared else None,
        )


def _figure(metric: MetricSummary | None) -> tuple[Cell, Cell, Cell]:
    if metric is None:
        return None, None, None
    interval = metric.interval
    return metric.value, interval.low if interval else None, interval.high if interval else None


def _comparison_cells(compared: MetricComparison | None) -> Sequence[Cell]:
    if compared is None:
        return (None,) * 9
    interval = compared.interval
    return (
        compared.difference,
        interval.low if interval else None,
        interval.high if interval else None,
        compared.p_value,
        compared.p_value_holm,
        compared.p_value_method,
        compared.wins,
        compared.ties,
        compared.losses,
    )


def _row_cells(rows: Iterable[RowView], names: Sequence[str]) -> Iterable[Sequence[Cell]]:
    for row in rows:
        candidate, baseline = row.candidate, row.baseline
        scores, unscored = row.scores.scores, row.scores.unscored
        other, other_unscored = row.scores.baseline_scores or {}, row.scores.baseline_unscored or {}
        yield (
            row.id,
            row.question,
            row.system_prompt,
            row.reference,
            *_answer_cells(candidate),
            *(_answer_cells(baseline) if baseline else (None,) * 7),
            *(scores.get(name, unscored.get(name)) for name in names),
            *(other.get(name, other_unscored.get(name)) for name in names),
        )


def _answer_cells(answer: Answer) -> Sequence[Cell]:
    return (
        answer.text,
        answer.error,
        answer.cut,
        answer.tokens,
        answer.reasoning,
        answer.cut_in_thoughts,
        answer.reasoning_tokens,
    )
