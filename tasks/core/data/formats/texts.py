"""The bytes of a text file, whatever it is packed or encoded in."""

from __future__ import annotations

import codecs
import io
import tempfile
from pathlib import Path
from typing import IO, cast

from tasks.core.data.formats.limits import UnpackedFile
from tasks.core.errors import DataError

BYTE_ORDER_MARK = codecs.BOM_UTF8
_EXCERPT_CHARACTERS = 80
_WIDE_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def open_text(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked; what is marked as UTF-16 or UTF-32 comes as UTF-8. Raises DataError."""
    is_packed = path.suffix.lower() == ".gz"
    file = cast(IO[bytes], io.BufferedReader(UnpackedFile(path)) if is_packed else path.open("rb"))
    start = file.read(4)
    file.seek(0)
    encoding = next((name for mark, name in _WIDE_MARKS.items() if start.startswith(mark)), None)
    if encoding is None and start.count(0) >= 2:
        file.close()
        raise DataError(
            f"{path}: not UTF-8 text (it looks like UTF-16 without a mark).", "Save the file as UTF-8."
        )
    return file if encoding is None else _recoded(file, encoding, path)


def _recoded(file: IO[bytes], encoding: str, path: Path) -> IO[bytes]:
    """The same text as UTF-8, in a temporary file, so that memory does not grow with it."""
    recoded = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    with io.TextIOWrapper(file, encoding=encoding, newline="") as text:
        try:
            while part := text.read(1 << 20):
                recoded.write(part.encode("utf-8", "replace"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: marked as {encoding.upper()}, but not text of that kind ({error.reason}).",
                "Save the file as UTF-8.",
            ) from error
    recoded.seek(0)
    return recoded


def excerpt(line: str) -> str:
    """The beginning of a line, for messages."""
    text = line.strip()
    return text if len(text) <= _EXCERPT_CHARACTERS else text[:_EXCERPT_CHARACTERS] + "…"
