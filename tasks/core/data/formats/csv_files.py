"""CSV files as spreadsheets and databases write them: each cell as the text that is written there."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tasks.core.data.formats.format import RowFormat
from tasks.core.data.formats.limits import LONGEST_LINE_BYTES, bounded_lines, check_width
from tasks.core.data.formats.texts import excerpt, open_text
from tasks.core.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader

_DELIMITERS = (",", "\t", ";", "|")
_NO_DELIMITER = "\x1f"
"""A file of one column: its cells may hold every mark, so nothing that is written delimits them."""
_SAMPLE_CHARACTERS = 1 << 18
_SAMPLE_ROWS = 100
_LINE_END = re.compile(r"\r\n|\r|\n")
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[ ]*\Z', re.IGNORECASE | re.DOTALL)


def _rows(path: Path, *_others: object, is_tabbed: bool) -> Iterator[Mapping[str, str]]:
    """The rows of a CSV file; `is_tabbed` tells that tabs delimit.

    The delimiter is that of a first line `sep=;`, else the one of comma, tab, semicolon and bar that the header
    has outside of quotes and that fits the rows. Blanks behind a delimiter do not belong to the cell.
    Raises DataError with file and line.
    """
    csv.field_size_limit(LONGEST_LINE_BYTES)
    with io.TextIOWrapper(open_text(path), encoding="utf-8-sig", newline="") as text:
        reader, lines_before = None, 0
        try:
            delimiter, lines_before = ("\t", 0) if is_tabbed else _delimiter_of(text)
            text.seek(0)
            for _ in range(lines_before):
                text.readline()
            reader = csv.reader(
                bounded_lines(text, path, lines_before),
                delimiter=delimiter,
                strict=True,
                skipinitialspace=True,
            )
            yield from _read_cells(reader, path, delimiter, lines_before)
        except csv.Error as error:
            line = lines_before + (reader.line_num if reader is not None else 1)
            raise DataError(f"{path}, line {line}: {error}.", "Check the quotes near this line.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).",
                'Save the file as UTF-8 (in a spreadsheet: "CSV UTF-8").',
            ) from error


CSV = RowFormat((".csv",), partial(_rows, is_tabbed=False))
TSV = RowFormat((".tsv",), partial(_rows, is_tabbed=True))


def _read_cells(reader: Reader, path: Path, delimiter: str, lines_before: int) -> Iterator[Mapping[str, str]]:
    header = next((cells for cells in reader if not _is_blank(cells)), None)
    if header is None:
        return
    check_width(len(header), path)
    names = [name.strip() or f"column {number}" for number, name in enumerate(header, start=1)]
    _refuse_repeated(names, path)
    for cells in reader:
        if not cells or (len(names) > 1 and _is_blank(cells)):
            continue
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {lines_before + reader.line_num}: {len(cells)} cells, but the header has {len(names)}: "
                f"{excerpt(delimiter.join(cells))}",
                f"Put quotes around cells that hold {_named(delimiter)}, a quote or a line break.",
            )
        yield dict(zip(names, cells, strict=True))


def _is_blank(cells: Sequence[str]) -> bool:
    return not cells or (len(cells) == 1 and not cells[0].strip())


def _delimiter_of(text: IO[str]) -> tuple[str, int]:
    """The delimiter, and how many lines at the beginning only name it."""
    sample = text.read(_SAMPLE_CHARACTERS)
    named = _SEPARATOR_LINE.match(_LINE_END.split(sample, 1)[0])
    if named is not None:
        return named[1], 1
    header = _unquoted_header(sample.lstrip("\r\n "))
    candidates = [mark for mark in _DELIMITERS if mark in header]
    if len(candidates) > 1:
        # Of marks that fit alike, one with a blank behind it is rather a part of a name; else the comma goes first.
        candidates.sort(key=lambda mark: (-_share_that_fits(sample, mark), f"{mark} " in header))
    return (candidates[0] if candidates else _NO_DELIMITER), 0


def _unquoted_header(sample: str) -> str:
    """What the first record holds outside of quotes."""
    unquoted = ""
    for part in sample.split('"')[::2]:
        before, *after = _LINE_END.split(part, 1)
        unquoted += before
        if after:
            break
    return unquoted


def _share_that_fits(sample: str, delimiter: str) -> float:
    """Share of the first rows that have as many cells as the header, if this mark delimits them."""
    reader = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, skipinitialspace=True)
    records = (cells for cells in reader if not _is_blank(cells))
    widths = [len(cells) for cells in islice(records, _SAMPLE_ROWS + 1)]
    if len(sample) == _SAMPLE_CHARACTERS and len(widths) <= _SAMPLE_ROWS:
        widths = widths[:-1]  # the sample ends within this row
    rows = widths[1:]
    return sum(width == widths[0] for width in rows) / len(rows) if rows else 0.0


def _refuse_repeated(names: Sequence[str], path: Path) -> None:
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(
            f"{path}: the header has {', '.join(map(repr, repeated))} more than once.", "Rename one of them."
        )


def _named(delimiter: str) -> str:
    return {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}.get(delimiter, repr(delimiter))
