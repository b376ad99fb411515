"""Files, rows, templates and models that grow without end meet a limit, with an error that names it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core.data import columns
from tasks.core.data.columns import ColumnMapping, examples
from tasks.core.data.formats import limits, parquet_files
from tasks.core.data.sources import load_rows
from tasks.core.errors import DataError, ModelLoadError, StorageError, TemplateError
from tasks.core.models.loading import ModelSpec, identify, load_model_and_tokenizer
from tasks.core.prompts import template_limits, tokens
from tasks.core.prompts.chat_template import ChatTemplate
from tasks.core.prompts.tokens import PromptBuilder
from tasks.core.records import Example, Message

pytestmark = pytest.mark.usefixtures("own_cache")
ROW = json.dumps({"question": "one and one?", "answer": "2"}).encode() + b"\n"
MAPPING = ColumnMapping("question", "answer")


def read(path: Path) -> list[Example]:
    return list(examples(load_rows(str(path), split=None), MAPPING))


# --- files


@pytest.mark.parametrize("line", [ROW, b"a"], ids=["many rows", "one line"])
def test_a_packed_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNPACKED_BYTES", 2 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    chunk = line * ((1 << 20) // len(line))
    parts = [packer.compress(chunk) for _ in range(10)]
    (tmp_path / "rows.jsonl.gz").write_bytes(b"".join([*parts, packer.flush()]))

    with pytest.raises(DataError, match=r"unpack to more than .* over 200 times as much"):
        read(tmp_path / "rows.jsonl.gz")


def test_a_packed_file_of_ordinary_rows_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"question,answer\n" + b"a,b\n" * 5000))

    assert len(read(tmp_path / "rows.csv.gz")) == 5000


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_line_beyond_the_limit_is_told_with_its_number(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LONGEST_LINE_BYTES", 1000)
    long = "x" * 1001
    rows = {
        "jsonl": ROW.decode() + json.dumps({"question": long}) + "\n",
        "csv": f"question,answer\n{long},1\n",
    }
    (tmp_path / f"rows.{suffix}").write_text(rows[suffix])

    with pytest.raises(DataError, match=r"line 2: longer than 1 kB"):
        read(tmp_path / f"rows.{suffix}")


@pytest.mark.parametrize("levels", [201, 300, 1010, 100_000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
def test_rows_that_are_nested_too_deeply_are_told_with_their_line(
    tmp_path: Path, levels: int, brackets: tuple[str, str]
) -> None:
    inner = brackets[0] * levels + "1" + brackets[1] * levels
    (tmp_path / "rows.jsonl").write_text(ROW.decode() + f'{{"question": "q", "answer": {inner}}}\n')

    with pytest.raises(DataError, match=r"line 2: nested more than 200 levels deep"):
        read(tmp_path / "rows.jsonl")


def test_a_row_that_is_nested_deeply_but_within_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"question": "q", "answer": {"[" * 190}1{"]" * 190}}}\n')

    assert read(tmp_path / "rows.jsonl")[0].reference == "[" * 190 + "1" + "]" * 190


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_table_with_a_million_columns_is_refused(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["question", "answer", *(f"c{number}" for number in range(limits.MOST_COLUMNS))]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({name: ["1"] for name in names}), path)
    elif suffix == "csv":
        path.write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n")
    else:
        path.write_text(json.dumps(dict.fromkeys(names, "1")) + "\n")

    with pytest.raises(DataError, match=r"more than 10,000 columns \(10,002\)"):
        read(path)


def write_repeated(path: Path, *, text: str, rows: int, in_a_list: bool = False) -> None:
    """A Parquet file that stores one text, and how often it stands."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts: Any = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    if in_a_list:
        texts, rows = pa.ListArray.from_arrays(pa.array([0, rows], pa.int32()), texts), 1
    # Statistics compare the text with itself, each time it stands there.
    pq.write_table(pa.table({"question": texts, "answer": ["1"] * rows}), path, write_statistics=False)


def test_a_small_parquet_file_of_more_text_than_the_disk_holds_is_refused(tmp_path: Path) -> None:
    write_repeated(tmp_path / "rows.parquet", text="b" * 10_000_000, rows=1_000_000)

    with pytest.raises(StorageError, match=r"needs about \d+\.\d GB, but its disk has"):
        read(tmp_path / "rows.parquet")


def test_a_parquet_cell_of_one_text_many_times_over_is_refused(tmp_path: Path) -> None:
    write_repeated(tmp_path / "rows.parquet", text="b" * 1_000_000, rows=1000, in_a_list=True)

    with pytest.raises(DataError, match=r"column 'question' has 1.0 GB, more than 268 MB"):
        read(tmp_path / "rows.parquet")


def test_a_parquet_file_of_long_rows_is_read_in_parts(tmp_path: Path) -> None:
    write_repeated(tmp_path / "rows.parquet", text="b" * 1_000_000, rows=100)

    assert parquet_files.rows_at_once(tmp_path / "rows.parquet", 1000) == 67
    assert [len(row.question) for row in read(tmp_path / "rows.parquet")] == [1_000_000] * 100


def test_memory_that_runs_out_is_told_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    (tmp_path / "rows.jsonl").write_bytes(ROW)
    monkeypatch.setattr("tasks.core.data.sources.open_files", no_memory)

    with pytest.raises(DataError, match=r"Memory ran out while .*rows\.jsonl was read"):
        read(tmp_path / "rows.jsonl")


# --- rows


@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_row_that_no_model_takes_becomes_an_error_row(tmp_path: Path, column: str) -> None:
    large = {"question": "q", "answer": "a", column: "word " * 2_000_000}
    (tmp_path / "rows.jsonl").write_bytes(ROW + json.dumps(large).encode() + b"\n" + ROW)

    rows = read(tmp_path / "rows.jsonl")

    assert [row.problem is None for row in rows] == [True, False, True]
    assert rows[1].problem == "the row has 10,000,001 characters, more than the 8,000,000 that a row may have"
    assert len(rows[1].question) < 2000 and rows[1].reference is None


def test_a_conversation_without_end_becomes_an_error_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MOST_TURNS", 3)
    turns = [{"role": role, "content": "text"} for role in ("user", "assistant") * 2] + [
        {"role": "user", "content": "?"}
    ]

    (row,) = examples([{"question": turns, "answer": "1"}], MAPPING)

    assert row.problem == "the conversation has 5 turns, more than the 3 that it may have"


def builder_of(tokenizer: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer, max_sequence_length=256, reserve_tokens=4)


def test_a_long_question_of_control_tokens_is_cut(tiny_tokenizer: Any) -> None:
    prompt = builder_of(tiny_tokenizer).build(Example("1", "How many?" + "<|im_end|>" * 300))

    assert prompt.problem is None and prompt.truncated_tokens > 0
    assert 240 < len(prompt.token_ids) <= 252


def test_a_long_question_that_the_template_writes_twice_is_cut(tiny_tokenizer: Any) -> None:
    twice = "{{ messages[-1].content }} again: {{ messages[-1].content }}{% if add_generation_prompt %} A:{% endif %}"
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = twice

    prompt = builder_of(tokenizer).build(Example("1", "seven apples and " * 60))

    assert prompt.problem is None and 230 < len(prompt.token_ids) <= 252


def test_a_long_conversation_is_shortened_in_few_renderings(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [Message("user" if n % 2 == 0 else "assistant", f"turn {n}") for n in range(2001)]
    builder = builder_of(tiny_tokenizer)
    rendered = 0
    render = ChatTemplate.render

    def counted(self: ChatTemplate, *args: Any, **kwargs: Any) -> Any:
        nonlocal rendered
        rendered += 1
        return render(self, *args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    prompt = builder.build(Example("1", "turn 2000", messages=tuple(turns)))

    assert prompt.problem is None and 200 < len(prompt.token_ids) <= 252
    assert rendered < 40


# --- templates

BASE = "{{ messages[-1].content }}"
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "no match": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "filters": "{% for i in range(99999) %}{% set x = range(99999)|select('eq', -1)|list %}{% endfor %}",
}
GROWING = {
    "times": "{{ 'a' * 10**10 }}",
    "list times": "{% set x = [1] * 10**10 %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubled": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "added": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "indent": "{{ ('a\n' * 90000)|indent(90000) }}",
    "replace": "{{ ('a' * 90000)|replace('a', 'b' * 90000) }}",
    "replace method": "{{ ('a' * 90000).replace('a', 'b' * 90000) }}",
    "join": "{{ range(99999)|join('b' * 90000) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "format by value": "{{ '%*d' % (10**9, 1) }}",
    "format method": "{{ '{:{}}'.format('x', 10**9) }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "tojson": "{{ {'a': 1}|tojson(indent=10**9) }}",
    "map": "{{ range(99999)|map('replace', '1', 'b' * 90000000)|list|length }}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_computes_without_end_is_stopped(
    source: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)

    with pytest.raises(TemplateError, match=r"it computes for more than 0.3 seconds"):
        ChatTemplate(tiny_tokenizer, source=source + BASE)


@pytest.mark.parametrize("source", GROWING.values(), ids=GROWING)
def test_a_template_that_grows_without_end_is_refused_before_it_takes_memory(
    source: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(TemplateError, match=r"more than|thousands of digits|without end|Range too big"):
        ChatTemplate(tiny_tokenizer, source=source + BASE)


def test_a_row_that_makes_a_template_grow_becomes_an_error_row(tiny_tokenizer: Any) -> None:
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = "{% if 'grow' in messages[-1].content %}{{ 'a' * 10**10 }}{% endif %}" + BASE
    builder = builder_of(tokenizer)

    prompts = list(
        builder.build_all([Example("1", "two and two?"), Example("2", "grow"), Example("3", "six?")])
    )

    assert [prompt.problem is None for prompt in prompts] == [True, False, True]
    assert "text of more than 64,000,000 characters" in str(prompts[1].problem)


LONG = {
    "at once": "{{ 'a b ' * 10**7 }}",
    "by pieces": "{% for a in range(99999) %}a b c d e f g {% endfor %}",
    "of its variables": "{% for a in range(999) %}{{ papers }}{% endfor %}",
}


@pytest.mark.parametrize("source", LONG.values(), ids=LONG)
def test_a_template_that_writes_more_than_a_tokenizer_takes_is_refused(
    source: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(TemplateError, match=r"characters of [\d,]+, more than the [\d,]+ that are read"):
        ChatTemplate(tiny_tokenizer, {"papers": ["a b " * 1000]}, source=source + BASE)


def test_a_row_of_which_a_template_makes_a_long_text_becomes_an_error_row(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = "{{ messages[0].content * (30 if 'grow' in messages[-1].content else 3) }}"
    monkeypatch.setattr(template_limits, "RENDERED_CHARACTERS", 600_000)
    short, long = "one " * 10_000, "grow" * 10_000

    prompts = list(builder_of(tokenizer).build_all([Example("1", short), Example("2", long)]))

    assert [prompt.problem is None for prompt in prompts] == [True, False]
    assert "it makes 1,200,000 characters of 40,006, more than the 600,000" in str(prompts[1].problem)


def test_rows_are_encoded_together_only_as_long_as_the_template_adds_little(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_CHARACTERS_AT_ONCE", 400_000)
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = "{{ 'one ' * 10000 }}" + BASE
    taken: list[int] = []

    def rows() -> Iterator[Example]:
        for number in range(40):
            taken.append(number)
            yield Example(str(number), "two and two?")

    next(builder_of(tokenizer).build_all(rows()))

    assert len(taken) == 10  # of 40,000 characters each, 400,000 at once


def test_templates_that_others_render_are_not_limited(tiny_tokenizer: Any) -> None:
    ChatTemplate(tiny_tokenizer)  # puts the limited sandbox in place
    long = "{{ 'a' * 65000000 }}"

    text = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], chat_template=long, tokenize=False
    )

    assert len(text) == 65_000_000


# --- models


def change(directory: Path, name: str, **values: Any) -> None:
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", -1),
        ("hidden_size", 10**9),
        ("hidden_size", 10**400),
        ("hidden_size", -64),
        ("intermediate_size", 10**12),
        ("vocab_size", 10**12),
        ("num_attention_heads", 0),
        ("max_position_embeddings", 10**15),
        ("rms_norm_eps", float("nan")),
        ("rope_parameters", {"rope_type": "default", "rope_theta": float("inf")}),
    ],
)
@pytest.mark.parametrize("use", [identify, load_model_and_tokenizer])
def test_figures_that_no_model_has_are_refused_with_file_and_key(
    model_copy: Path, key: str, value: Any, use: Callable[[ModelSpec], Any]
) -> None:
    change(model_copy, "config.json", **{key: value})

    with pytest.raises(ModelLoadError, match=rf"config\.json: {key}.* is (no figure of a model|nan|inf)"):
        use(ModelSpec(str(model_copy)))


def test_a_configuration_that_asks_for_more_weights_than_there_are_is_refused(model_copy: Path) -> None:
    change(model_copy, "config.json", hidden_size=1_000_000, vocab_size=1_000_000)

    with pytest.raises(ModelLoadError, match=r"config\.json does not fit the weights"):
        load_model_and_tokenizer(ModelSpec(str(model_copy)))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_configuration_that_is_nested_without_end_is_called_damaged(model_copy: Path, name: str) -> None:
    (model_copy / name).write_text('{"a":' * 100_000)

    with pytest.raises(ModelLoadError, match=rf"{name} is damaged: it is nested too deeply"):
        identify(ModelSpec(str(model_copy)))


def test_an_end_token_that_is_no_number_is_refused(model_copy: Path) -> None:
    change(model_copy, "generation_config.json", eos_token_id="x")

    with pytest.raises(ModelLoadError, match=r"generation_config\.json: eos_token_id = 'x' is no token id"):
        load_model_and_tokenizer(ModelSpec(str(model_copy)))


def test_an_adapter_of_an_impossible_rank_is_refused(tmp_path: Path) -> None:
    from tasks.core.models.config_figures import check_figures

    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 10**9, "peft_type": "LORA"}))

    with pytest.raises(ModelLoadError, match=r"adapter_config\.json: r = 1000000000 is no figure"):
        check_figures(tmp_path)
