"""Rows come back as they were written, whatever file they are in; what cannot be read says where and why."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.core.data.sources import load_rows
from tasks.core.errors import DataError, StorageError

ROWS = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(5)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path_factory.mktemp("cache")))


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_jsonl(path: Path) -> Path:
    path.write_text(_lines(ROWS))
    return path


def _write_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=2))
    return path


def _write_wrapped_json(path: Path) -> Path:
    path.write_text(json.dumps({"version": "1.0", "data": ROWS}))
    return path


def _write_csv(path: Path) -> Path:
    path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    return path


def _write_parquet(path: Path) -> Path:
    import pandas as pd

    pd.DataFrame(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", _write_jsonl),
        ("rows.ndjson", _write_jsonl),
        ("lines_called.json", _write_jsonl),
        ("rows.json", _write_json),
        ("a_list_called.jsonl", _write_json),
        ("wrapped.json", _write_wrapped_json),
        ("rows.csv", _write_csv),
        ("rows.parquet", _write_parquet),
    ],
)
def test_each_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path], Path]
) -> None:
    assert load_rows(str(write(tmp_path / name)), split="test").to_list() == ROWS


def test_a_compressed_file_is_read_like_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(_lines(ROWS).encode()))
    assert load_rows(str(path), split=None).to_list() == ROWS


def test_a_file_with_byte_order_mark_crlf_and_blank_lines_reads_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + _lines(ROWS).replace("\n", "\r\n\r\n").encode())
    assert load_rows(str(path), split=None).to_list() == ROWS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.fixed_dictionaries({"question": json_values, "answer": json_values}), min_size=1, max_size=8
    )
)
def test_every_json_value_comes_back_with_its_own_type(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines(rows))
    assert load_rows(str(path), split=None).to_list() == rows


def test_a_question_that_is_text_in_one_row_and_a_number_in_the_next_does_not_stop_the_load(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mixed.jsonl"
    values = ["5", 5, None, 5.5, True, {"a": 1}, ["x"], "2012-01-01 00:00:00"]
    path.write_text(_lines([{"question": value} for value in values]))
    assert list(load_rows(str(path), split=None)["question"]) == values


def test_a_column_that_appears_late_is_none_in_earlier_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(_lines([{"question": "a"}] * 1500 + [{"question": "b", "answer": "c"}]))
    rows = load_rows(str(path), split=None)
    assert (rows[0]["answer"], rows[1500]["answer"]) == (None, "c")


def test_csv_cells_stay_the_text_that_is_written_in_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        'question,answer\n007,NA\n2024-01-02,null\n123456789012345678901,1.50\n"two\nlines, ""quoted""",\n',
        "utf-8",
    )
    assert load_rows(str(path), split=None).to_list() == [
        {"question": "007", "answer": "NA"},
        {"question": "2024-01-02", "answer": "null"},
        {"question": "123456789012345678901", "answer": "1.50"},
        {"question": 'two\nlines, "quoted"', "answer": ""},
    ]


@pytest.mark.parametrize(("name", "mark"), [("rows.tsv", "\t"), ("rows.csv", ";"), ("rows.csv", "\t")])
def test_other_delimiters_are_understood(tmp_path: Path, name: str, mark: str) -> None:
    path = tmp_path / name
    path.write_text(f"question{mark}answer\na, b{mark}c\n")
    assert load_rows(str(path), split=None).to_list() == [{"question": "a, b", "answer": "c"}]


def test_half_a_surrogate_pair_and_nan_do_not_stop_the_load(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "broken \\ud83d here", "score": NaN}\n')
    assert load_rows(str(path), split=None).to_list() == [{"question": "broken ? here", "score": None}]


# --- folders and splits


def test_a_folder_of_split_files_gives_the_split_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00002.jsonl").write_text(_lines(ROWS[:2]))
    (tmp_path / "data" / "train-00001-of-00002.jsonl").write_text(_lines(ROWS[2:4]))
    (tmp_path / "data" / "dev.jsonl").write_text(_lines(ROWS[4:]))
    (tmp_path / "README.md").write_text("about the data")
    assert load_rows(str(tmp_path), split="train").to_list() == ROWS[:4]
    assert load_rows(str(tmp_path), split="validation").to_list() == ROWS[4:]
    with pytest.raises(
        DataError, match=r"split 'test' is not there; there are: validation, train|train, validation"
    ):
        load_rows(str(tmp_path), split="test")


def test_a_folder_without_split_names_gives_all_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(_lines(ROWS[:2]))
    (tmp_path / "b.csv").write_text("question,answer\nlast,1\n")
    assert len(load_rows(str(tmp_path), split="test")) == 3


def test_a_train_only_folder_is_never_taken_for_test_data(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(_lines(ROWS))
    with pytest.raises(DataError, match="there are: train"):
        load_rows(str(tmp_path), split="test")


def test_parquet_files_with_different_columns_are_joined(tmp_path: Path) -> None:
    import pandas as pd

    pd.DataFrame({"question": ["a"], "n": [1]}).to_parquet(tmp_path / "1.parquet")
    pd.DataFrame({"question": pd.Categorical(["b"]), "m": ["x"]}).to_parquet(tmp_path / "2.parquet")
    assert load_rows(str(tmp_path), split=None).to_list() == [
        {"question": "a", "n": 1, "m": None},
        {"question": "b", "n": None, "m": "x"},
    ]


def test_saved_datasets_are_read_with_their_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:])}).save_to_disk(
        tmp_path / "several"
    )
    assert load_rows(str(tmp_path / "one"), split="test").to_list() == ROWS
    assert load_rows(str(tmp_path / "several"), split="test").to_list() == ROWS[3:]
    with pytest.raises(DataError, match=r"split 'dev' is not there; there are: train, test"):
        load_rows(str(tmp_path / "several"), split="dev")


def test_a_json_object_of_named_lists_offers_them_as_splits(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": ROWS[:2], "test": ROWS[2:]}))
    assert load_rows(str(path), split="test").to_list() == ROWS[2:]
    with pytest.raises(DataError, match=r"2 lists \(train, test\)"):
        load_rows(str(path), split="dev")


@pytest.mark.parametrize(
    ("split", "expected"), [("test[:2]", 2), ("test[1:3]", 2), ("test[-1:]", 1), ("x[:40%]", 2)]
)
def test_slices_of_a_split_are_understood(tmp_path: Path, split: str, expected: int) -> None:
    assert len(load_rows(str(_write_jsonl(tmp_path / "r.jsonl")), split=split)) == expected


def test_max_rows_keeps_the_first_rows(tmp_path: Path) -> None:
    assert load_rows(str(_write_jsonl(tmp_path / "r.jsonl")), split=None, max_rows=2).to_list() == ROWS[:2]


# --- what cannot be read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "a"}\n\n{"question": "b"\n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"question": "a"}\n["b"]\n', r"a\.jsonl, line 2: not a JSON object but a list"),
        ("a.jsonl", b'{"question": "a"}\n{"question": "\xff"}\n', r"line 2: not UTF-8"),
        ("a.jsonl", b"", r"holds no rows"),
        ("a.json", b"", r"a\.json is empty"),
        ("a.json", b"[]", r"holds no rows"),
        ("a.json", b'[{"question": "a"},\n {"question" "b"}]', r"a\.json, line 2: not valid JSON"),
        ("a.json", b'[{"question": "a"}, 5]', r"item 2 of the list is a number"),
        ("a.json", b'{"question": "a"}', r"holds an object, not a list of objects"),
        ("a.csv", b"", r"holds no rows"),
        ("a.csv", b"question,answer\n", r"holds no rows"),
        ("a.csv", b"question,answer\na,b\nc\n", r"a\.csv, line 3: 1 cells, but the header has 2"),
        ("a.csv", b'question,answer\na,"b\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", b"question,question\na,b\n", r"the header has 'question' more than once"),
        ("a.csv", b"question\nna\xefve\n", r"a\.csv: not UTF-8"),
        ("a.parquet", b"not parquet at all", r"a\.parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "a"}\n', mtime=0)[:-9], r"damaged compressed file"),
        ("a.txt", b"question", r"no data file"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(tmp_path / name), split=None)
    assert caught.value.next_step


def test_a_missing_file_names_the_nearest_ones(tmp_path: Path) -> None:
    _write_jsonl(tmp_path / "questions.jsonl")
    with pytest.raises(DataError, match=r"Did you mean: questions\.jsonl"):
        load_rows(str(tmp_path / "question.jsonl"), split=None)
    with pytest.raises(DataError, match=r"folder .* does not exist"):
        load_rows(str(tmp_path / "nowhere" / "question.jsonl"), split=None)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data files"):
        load_rows(str(tmp_path), split=None)


@pytest.mark.parametrize("split", ["tra in", "train[", "train[a:b]"])
def test_a_split_that_makes_no_sense_is_an_error(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match="cannot be understood"):
        load_rows(str(_write_jsonl(tmp_path / "r.jsonl")), split=split)


# --- the cache


def test_a_file_changed_in_place_is_noticed_even_with_equal_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "old"}\n')
    before = path.stat()
    assert load_rows(str(path), split=None)["question"][0] == "old"
    path.write_text('{"question": "new"}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_rows(str(path), split=None)["question"][0] == "new"


def test_a_damaged_cached_copy_is_written_again(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "rows.jsonl")
    load_rows(str(path), split=None)
    (copy,) = Path(os.environ["TUNEPROOF_CACHE"]).rglob("*.arrow")
    copy.write_bytes(b"")
    assert load_rows(str(path), split=None).to_list() == ROWS


def test_a_failed_load_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(DataError):
        load_rows(str(path), split=None)
    assert not [entry for entry in Path(os.environ["TUNEPROOF_CACHE"]).rglob("*") if entry.is_file()]


def test_a_cache_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "a_file"))
    with pytest.raises(StorageError, match="TUNEPROOF_CACHE"):
        load_rows(str(_write_jsonl(tmp_path / "r.jsonl")), split=None)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak_megabytes(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            for number in range(rows):
                file.write(
                    json.dumps({"question": f"{number} " + "word " * 80, "answer": str(number)}) + "\n"
                )
        code = (
            "import resource, sys\nfrom pathlib import Path\nfrom tasks.core.data.local_files import open_files\n"
            f"rows = open_files([Path({str(path)!r})])\nassert len(rows) == {rows}\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        return int(done.stdout)

    # Rows that are held take 80 MB, their text 42; rows that are read in turn 10.
    assert peak_megabytes(100_000) < peak_megabytes(2_000) + 35


# --- the Hub


def test_a_hub_dataset_without_network_says_so() -> None:
    with pytest.raises(DataError, match="neither a file here nor in the local Hub cache") as caught:
        load_rows("nobody/nothing", split="test", revision="abc")
    assert "HF_HUB_OFFLINE" in str(caught.value)


class _Hub(BaseHTTPRequestHandler):
    """A Hub that has one public dataset `some/data` with one commit, and one gated dataset."""

    files: ClassVar = {"train.jsonl": _lines(ROWS[:3]).encode(), "test.jsonl": _lines(ROWS[3:]).encode()}
    tables: ClassVar[dict[str, bytes]] = {}
    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        files = self.tables if "some/tables" in self.path else self.files
        if "some/data" not in self.path and "some/tables" not in self.path:
            error = ("GatedRepo", 403) if "gated" in self.path else ("RepoNotFound", 404)
            return self._answer(error[1], b"{}", {"X-Error-Code": error[0], "X-Error-Message": error[0]})
        revision = re.search(r"/(?:revision|tree|resolve|paths-info)/([^/?]+)", self.path)
        if revision and revision[1] not in ("main", "v1", self.commit):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "/resolve/" in self.path:
            name = self.path.rsplit("/", 1)[-1]
            if name not in files:
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": self.commit}
            return self._answer(200, files[name], headers)
        if "/tree/" in self.path or "/paths-info/" in self.path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()
            ]
            return self._answer(200, json.dumps(tree).encode(), {})
        siblings = [{"rfilename": name} for name in files]
        info = {
            "id": "some/tables" if files is self.tables else "some/data",
            "sha": self.commit,
            "private": False,
            "siblings": siblings,
            "tags": [],
        }
        return self._answer(200, json.dumps(info).encode(), {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep the test output clean."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _load_in_new_process(hub: str, home: Path, *loads: dict[str, str]) -> list[str]:
    """What each load gave: rows as JSON, or the error.

    The Hub's address is read when the libraries are imported, so they have a process of their own.
    """
    code = (
        "import json, sys\nfrom tasks.core.data.sources import load_rows\nfrom tasks.core.errors import DataError\n"
        "told = []\n"
        "for load in json.loads(sys.argv[1]):\n"
        "    try:\n        told.append(json.dumps(load_rows(**load).to_list()))\n"
        "    except DataError as error:\n        told.append(str(error))\n"
        "print(json.dumps(told))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(loads)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told: list[str] = json.loads(done.stdout)
    return told


@pytest.mark.slow
def test_hub_datasets_are_read_at_the_split_and_revision_asked_for_and_with_a_column_of_an_unknown_type(
    hub: str, tmp_path: Path
) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    extra = pa.array([[("a", "1")]] * len(ROWS), pa.map_(pa.string(), pa.string()))
    table = pa.Table.from_pylist(ROWS).append_column("extra", extra)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    _Hub.tables["test.parquet"] = sink.getvalue()
    chosen = {"data_id": "some/data", "split": "test", "revision": "v1"}
    of_data, of_tables = _load_in_new_process(
        hub, tmp_path, chosen, {"data_id": "some/tables", "split": "test"}
    )
    assert json.loads(of_data) == ROWS[3:]
    assert any("v1" in path for path in _Hub.asked)
    assert json.loads(of_tables) == [{**row, "extra": {"a": "1"}} for row in ROWS]


REFUSED = (
    ({"data_id": "some/data", "split": "dev"}, "some/data has no split 'dev'; there are: train, test"),
    ({"data_id": "some/data", "split": "test", "revision": "v9"}, "at revision 'v9' is not on the Hub"),
    ({"data_id": "some/missing", "split": "test"}, "some/missing is not on the Hub, or not open to you"),
    ({"data_id": "some/gated", "split": "test"}, "some/gated is not on the Hub, or not open to you"),
    ({"data_id": "some/data:main", "split": "test"}, "Write the one you want behind a colon"),
)


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_with_what_to_do(hub: str, tmp_path: Path) -> None:
    told = _load_in_new_process(hub, tmp_path, *(load for load, _ in REFUSED))
    for text, (_, message) in zip(told, REFUSED, strict=True):
        assert message in text
        assert "next:" in text


def test_a_pipe_with_the_name_of_a_data_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl is a pipe or a device and no file"):
        load_rows(str(tmp_path / "rows.jsonl"), split="test")
