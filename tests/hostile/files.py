"""Hostile files: what may stand where data is expected."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.hostile.items import MARKER, SOUND, Item, Outcome, Overrides, file

_LINE = json.dumps(SOUND).encode() + b"\n"


def _made(
    name: str, make: Callable[[Path], Path], outcome: Outcome, says: str = "", *, slow: bool = False
) -> Item:
    def overrides(folder: Path, _model_dir: Path) -> Overrides:
        return {"inferencer.testing_data_id": str(make(folder))}

    return Item(name, overrides, outcome, says, slow)


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def _loop(folder: Path) -> Path:
    (folder / "rows.jsonl").symlink_to(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def _folder(folder: Path) -> Path:
    (folder / "rows.jsonl").mkdir()
    return folder / "rows.jsonl"


def _script(folder: Path) -> Path:
    path = folder / "dataset"
    path.mkdir()
    (path / "dataset.py").write_text(f"open({str(folder / MARKER)!r}, 'w').close()\n")
    return path


def _script_file(folder: Path) -> Path:
    path = folder / "rows.py"
    path.write_text(f"open({str(folder / MARKER)!r}, 'w').close()\n")
    return path


def _pickle(folder: Path) -> Path:
    path = folder / "rows.pkl"
    path.write_bytes(f"cos\nsystem\n(S'touch {folder / MARKER}'\ntR.".encode())
    return path


def _zip_out() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../out.jsonl", _LINE)
    return buffer.getvalue()


def _bomb() -> bytes:
    block = gzip.compress(b" " * 100_000_000, 9)
    return gzip.compress(_LINE) + block * 200


ITEMS: tuple[Item, ...] = (
    file("empty file", "rows.jsonl", b"", "refused"),
    file("blank lines only", "rows.jsonl", b"\n\n \n", "refused"),
    file("byte order mark", "rows.jsonl", b"\xef\xbb\xbf" + _LINE, "answered"),
    file("carriage returns", "rows.jsonl", _LINE.replace(b"\n", b"\r\n") * 2, "answered"),
    file("no newline at the end", "rows.jsonl", _LINE.rstrip(), "answered"),
    file("UTF-16", "rows.jsonl", _LINE.decode().encode("utf-16"), "answered"),
    file("NULs only", "rows.jsonl", b"\0" * 5000, "refused"),
    file("random bytes", "rows.jsonl", bytes(range(256)) * 40, "refused"),
    file("gzip that is none", "rows.jsonl.gz", _LINE, "refused"),
    file("torn gzip", "rows.jsonl.gz", gzip.compress(_LINE * 500)[:-20], "refused"),
    file("gzip bomb", "rows.jsonl.gz", _bomb, "refused", slow=True),
    file("zip that leads out", "rows.zip", _zip_out, "refused"),
    file("JSON that is a number", "rows.json", b"17", "refused"),
    file("JSON without end", "rows.json", b"[" * 200_000, "refused"),
    file("JSON list of sound rows", "rows.json", b"[" + _LINE.rstrip() + b"]", "answered"),
    file("CSV without rows", "rows.csv", b"question,answer\n", "refused"),
    file("CSV with an open quote", "rows.csv", b'question,answer\na,1\n"b,2\n', "refused"),
    file("CSV with formulas", "rows.csv", b'question,answer\n=HYPERLINK("x"),1\n@SUM(1),2\n', "answered"),
    file("CSV with NULs", "rows.csv", b"question,answer\na\0b,1\n", "answered"),
    file("CSV with more cells than names", "rows.csv", b"question,answer\na,1,2,3\n", "refused", "line 2|cells"),
    file("Parquet that is none", "rows.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "refused"),
    file("text of another kind", "rows.exe", b"MZ" + b"\0" * 100, "refused"),
    _made("named pipe", _fifo, "refused"),
    _made("link to itself", _loop, "refused"),
    _made("folder with a file's name", _folder, "refused"),
    _made("folder with a script", _script, "refused"),
    _made("Python script", _script_file, "refused"),
    _made("pickle", _pickle, "refused"),
    _made("/dev/null", lambda _: Path("/dev/null"), "refused"),
    _made("/dev/zero", lambda _: Path("/dev/zero"), "refused"),
    _made("file of the system", lambda _: Path("/etc/passwd"), "refused"),
    _made("nothing there", lambda folder: folder / "none.jsonl", "refused"),
    _made("name of 4,000 characters", lambda _: Path("x" * 4000 + ".jsonl"), "refused"),
)  # fmt: skip
