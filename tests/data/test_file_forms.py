"""Files as other tools write them: CSV dialects, any Arrow type, patterns and lists of files, repeated keys."""

from __future__ import annotations

import datetime as dt
import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.data.formats.json_texts import read_json, repeated_keys, write_json
from tasks.core.data.sources import load_rows
from tasks.core.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path_factory.mktemp("cache")))


def _rows(path: Path, content: str | bytes) -> list[dict[str, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_rows(str(path), split=None).to_list()  # type: ignore[no-any-return]


def _references(path: Path) -> list[str | None]:
    mapping = ColumnMapping("question", "answer")
    return [example.reference for example in examples(load_rows(str(path), split=None), mapping)]


# --- CSV


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sep=;\r\nquestion;answer\r\nWhat is 9 times 8?;72\r\n", ("What is 9 times 8?", "72")),
        ('"sep=|"\nquestion|answer\na, b|c; d\n', ("a, b", "c; d")),
        ("question|answer\na, b|c\n", ("a, b", "c")),
        ('question, answer\n"Add 1, 2 and 3", "6"\n', ("Add 1, 2 and 3", "6")),
        ("question;answer\n1,5 plus 1,5;3,0\n", ("1,5 plus 1,5", "3,0")),
        ("\ufeffquestion;answer\na;b\n", ("a", "b")),
        ('"question"\t"answer"\na, b; c\td\n', ("a, b; c", "d")),
        ('question;answer\n"two\nlines; and ""quotes""";x\n', ('two\nlines; and "quotes"', "x")),
        ("question,answer\r\r\n", None),
    ],
)
def test_a_csv_file_is_read_in_its_own_dialect(
    tmp_path: Path, content: str, expected: tuple[str, str] | None
) -> None:
    if expected is None:
        with pytest.raises(DataError, match="holds no rows"):
            _rows(tmp_path / "a.csv", content)
        return
    assert _rows(tmp_path / "a.csv", content) == [dict(zip(("question", "answer"), expected, strict=True))]


def test_a_mark_inside_quotes_or_in_a_name_is_no_delimiter(tmp_path: Path) -> None:
    quoted = _rows(tmp_path / "a.csv", 'question;"answer, short"\nWhat is 9 times 8?;72\n')
    assert quoted == [{"question": "What is 9 times 8?", "answer, short": "72"}]
    bare = _rows(tmp_path / "b.csv", "question;answer, short\nx;1,5\ny;2,5\n")
    assert bare == [
        {"question": "x", "answer, short": "1,5"},
        {"question": "y", "answer, short": "2,5"},
    ]


def test_a_file_of_one_column_may_hold_any_mark(tmp_path: Path) -> None:
    assert _rows(tmp_path / "a.csv", 'question\nAdd 1, 2 and 3; then | 4\n"quoted"\n') == [
        {"question": "Add 1, 2 and 3; then | 4"},
        {"question": "quoted"},
    ]


def test_a_line_with_other_cells_is_named_also_behind_a_line_that_names_the_delimiter(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv, line 4: 1 cells, but the header has 2: c"):
        _rows(tmp_path / "a.csv", "sep=;\nquestion;answer\na;b\nc\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_wide_text_with_a_mark_is_decoded(tmp_path: Path, name: str, encoding: str) -> None:
    text = "question,answer\né\u2028x,y\n" if name == "a.csv" else '{"question": "é\u2028x", "answer": "y"}\n'
    assert _rows(tmp_path / name, text.encode(encoding)) == [{"question": "é\u2028x", "answer": "y"}]


def test_wide_text_without_a_mark_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv: not UTF-8 text \(it looks like UTF-16"):
        _rows(tmp_path / "a.csv", "question,answer\na,b\n".encode("utf-16-le"))


# --- JSON


def test_numbers_keep_all_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"question": "2^80?", "answer": 1208925819614629174706176}\n'
        '{"question": "2^64?", "answer": 18446744073709551616}\n'
        '{"question": "pi?", "answer": 3.14159265358979323846}\n'
        '{"question": "small?", "answer": 7}\n'
    )
    assert _references(path) == [
        "1208925819614629174706176",
        "18446744073709551616",
        "3.14159265358979323846",
        "7",
    ]


def test_a_key_that_an_object_has_twice_is_told_with_its_line_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"question": "\\"a\\": b", "answer": "1"}\n{"question":"q","answer":"41","answer":"42"}\n'
    )
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert load_rows(str(path), split=None)[1]["answer"] == "42"
        assert f"{path}, line 2: the key 'answer' is there more than once" in caplog.text
        assert "line 1" not in caplog.text


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ('{"a": 1, "b": [{"c": 1, "c": 2}]}', ["c"]),
        ('{"a" : 1,\n"a"\t:2}', ["a"]),
        (r'{"a\\": 1, "a\\": 2}', ["a\\"]),
        (r'{"a": "x\\", "b": "\": \":"}', []),
        ('{"a": {"a": {"a": 1}}}', []),
    ],
)
def test_repeated_keys_are_found_at_any_depth_and_nowhere_else(text: str, keys: list[str]) -> None:
    assert repeated_keys(text.encode(), read_json(text.encode())) == keys


def test_whole_numbers_that_became_floats_by_a_gap_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": 4.0}\n{"question": "b", "answer": null}\n')
    assert _references(path) == ["4", None]
    path.write_text('{"question": "a", "answer": 4.0}\n{"question": "b", "answer": 2.5}\n{"question": "c"}\n')
    assert _references(path) == ["4.0", "2.5", None]
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [4.0, float("nan")]}), tmp_path / "a.parquet")
    assert _references(tmp_path / "a.parquet") == ["4", None]
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [4.0, 7.0]}), tmp_path / "b.parquet")
    assert _references(tmp_path / "b.parquet") == ["4.0", "7.0"]


def test_json_is_written_with_all_digits_dates_and_half_surrogates() -> None:
    value = {"é": [2**70, Decimal("4.50"), dt.date(2024, 5, 1), b"x"], 1: "a\ud83d"}
    assert write_json(value) == f'{{"é":[{2**70},4.50,"2024-05-01","x"],"1":"a?"}}'


# --- tables

_UNUSUAL: dict[str, pa.Array] = {
    "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
    "list of maps": pa.array([[[("a", 1)]], None], pa.list_(pa.map_(pa.string(), pa.int64()))),
    "string view": pa.array(["a", None], pa.string_view()),
    "list view": pa.array([["a"], None], pa.list_view(pa.string())),
    "large list": pa.array([["a"], None], pa.large_list(pa.string())),
    "dictionary in a list": pa.array([["a"], ["b"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "decimal256": pa.array([Decimal("1.50"), None], pa.decimal256(50, 2)),
    "decimal32": pa.array([Decimal("1.50"), None], pa.decimal32(5, 2)),
    "duration": pa.array([dt.timedelta(seconds=5), None], pa.duration("ns")),
    "null": pa.nulls(2),
    "extension": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16, None], pa.binary(16))),
    "year 20000": pa.array([568_971_820_800, None], pa.timestamp("s")),
    "union": pa.UnionArray.from_dense(
        pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array(["a"]), pa.array([2])]
    ),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array(["x", "y"])),
    "interval": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
}


def _write_table(table: pa.Table, folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
        return path
    path = folder / "data.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    if kind == "saved":
        state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "a", "_split": None}
        unset = ("_format_columns", "_format_type")
        state |= dict.fromkeys(unset) | {"_format_kwargs": {}, "_output_all_columns": False}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
        return folder
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
@pytest.mark.parametrize("name", _UNUSUAL)
def test_a_column_of_any_type_beside_the_others_stops_nothing(tmp_path: Path, name: str, kind: str) -> None:
    table = pa.table({"question": ["a", "b"], "answer": ["c", "d"], "other": _UNUSUAL[name]})
    try:
        path = _write_table(table, tmp_path, kind)
    except pa.ArrowException:
        pytest.skip(f"no {kind} file can hold this type")
    assert _references(path) == ["c", "d"]
    as_reference = ColumnMapping("question", "other")
    assert len(list(examples(load_rows(str(path), split=None), as_reference))) == 2


def test_references_of_a_table_are_what_a_person_would_write(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    values: list[tuple[pa.Array, str]] = [
        (pa.array([Decimal("4.50")]), "4.50"),
        (pa.array([dt.date(2024, 5, 1)]), "2024-05-01"),
        (pa.array([dt.datetime(2024, 5, 1, 12, 30)], pa.timestamp("ns")), "2024-05-01T12:30:00"),
        (pa.array([dt.time(12, 30)]), "12:30:00"),
        (pa.array([dt.timedelta(days=1, hours=2, seconds=1.5)]), "P1DT2H1.5S"),
        (pa.array([True]), "true"),
        (pa.array([b"text"]), "text"),
        (pa.array([{"b": 1, "a": "é"}]), '{"b":1,"a":"é"}'),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), '{"k":1}'),
        (pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1)),
    ]
    for number, (column, expected) in enumerate(values):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"question": ["q"], "answer": column}), path)
        assert _references(path) == [expected]
    labels = Features({"question": Value("string"), "answer": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"question": ["a", "b"], "answer": [1, None]}, features=labels)
    dataset.to_parquet(tmp_path / "labels.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    assert _references(tmp_path / "labels.parquet") == _references(tmp_path / "saved") == ["yes", None]


def test_bytes_that_are_no_text_make_an_error_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["q"], "answer": [b"\xff\xfe"]}), tmp_path / "a.parquet")
    (row,) = examples(load_rows(str(tmp_path / "a.parquet"), split=None), ColumnMapping("question", "answer"))
    assert row.problem == "the reference is not text but 2 bytes that are no UTF-8"


def test_parquet_files_whose_columns_differ_in_type_keep_each_value(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a"], "answer": [4], "n": [1]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"question": ["b"], "answer": [2.5], "n": ["x"]}), tmp_path / "2.parquet")
    pq.write_table(pa.table({"question": ["c"], "answer": [None]}), tmp_path / "3.parquet")
    assert _references(tmp_path) == ["4", "2.5", None]
    assert load_rows(str(tmp_path), split=None)["n"][:] == [1, "x", None]


def test_the_names_of_labels_are_those_of_each_file(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    for number, names in enumerate((["no", "yes"], ["yes", "no"])):
        features = Features({"question": Value("string"), "answer": ClassLabel(names=names)})
        rows = Dataset.from_dict({"question": ["q"], "answer": [0]}, features=features)
        rows.to_parquet(tmp_path / f"{number}.parquet")
    assert _references(tmp_path) == ["no", "yes"]


def test_a_slice_of_a_saved_dataset_is_read_as_the_whole_says(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"question": ["a", "b"], "answer": [4.0, None]}).save_to_disk(tmp_path / "saved")
    rows = load_rows(str(tmp_path / "saved"), split="test[:1]")
    assert [row.reference for row in examples(rows, ColumnMapping("question", "answer"))] == ["4"]


# --- several files


def _questions(data_id: str | list[str], split: str | None = None) -> list[str]:
    return list(load_rows(data_id, split=split)["question"])


def _write(path: Path, question: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"question": question}) + "\n")
    return path


def test_patterns_and_lists_give_the_rows_of_all_files_in_order(tmp_path: Path) -> None:
    b, a, deep = (
        _write(tmp_path / "b.jsonl", "b"),
        _write(tmp_path / "a.jsonl", "a"),
        tmp_path / "x" / "c.jsonl",
    )
    _write(deep, "c")
    (tmp_path / "notes.txt").write_text("no data")
    assert _questions(f"{tmp_path}/*.jsonl", "test") == ["a", "b"]
    assert _questions(f"{tmp_path}/*") == ["a", "b", "c"]
    assert _questions(f"{tmp_path}/**/*.jsonl") == ["a", "b", "c"]
    assert _questions([str(b), str(a)]) == ["b", "a"]
    assert _questions([str(deep), f"{tmp_path}/[ab].jsonl"]) == ["c", "a", "b"]


def test_a_pattern_over_several_splits_gives_the_one_that_was_asked_for(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", "learnt")
    assert _questions(f"{tmp_path}/*.jsonl", "test") == ["learnt"]  # one split only: it was meant
    _write(tmp_path / "test.jsonl", "asked")
    assert _questions(f"{tmp_path}/*.jsonl", "test") == ["asked"]
    with pytest.raises(DataError, match="the split 'validation' is not there"):
        _questions(f"{tmp_path}/*.jsonl", "validation")


def test_a_pattern_that_matches_nothing_names_what_is_there(tmp_path: Path) -> None:
    _write(tmp_path / "rows.jsonl", "q")
    with pytest.raises(DataError, match=r"matches nothing in") as caught:
        _questions(f"{tmp_path}/*.parquet")
    assert "rows.jsonl" in str(caught.value)
    with pytest.raises(DataError, match="there is no folder"):
        _questions(f"{tmp_path}/nowhere/*.jsonl")
    with pytest.raises(DataError, match=r"There is no file no\.jsonl"):
        _questions([str(tmp_path / "rows.jsonl"), str(tmp_path / "no.jsonl")])


def test_a_changed_file_of_a_pattern_is_noticed(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", "old")
    assert _questions(f"{tmp_path}/*.jsonl") == ["old"]
    path.write_text('{"question": "new"}\n')
    _write(tmp_path / "b.jsonl", "more")
    assert _questions(f"{tmp_path}/*.jsonl") == ["new", "more"]


def test_a_pattern_over_splits_tells_which_files_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "test"):
        _write(tmp_path / f"{name}.jsonl", name)
    with caplog.at_level(logging.INFO):
        _questions(f"{tmp_path}/*.jsonl", "train")
    assert "matches several splits" in caplog.text
    assert str(tmp_path / "train.jsonl") in caplog.text
