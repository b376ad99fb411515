"""Models that think, from prompt to score: a tiny one that has learnt sums with thoughts, and scripted answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import load_config
from tasks.core.errors import RunKeyMismatchError
from tasks.core.generation.batching import RequestQueue
from tasks.core.generation.engines.base import GeneratedRow
from tasks.core.memory.budget import TokenBudget
from tasks.core.prompts.answer_reading import AnswerGate, AnswerReader
from tasks.core.prompts.tokens import PromptBuilder
from tasks.core.records import Example, GenerationSettings, Prediction
from tasks.core.runs.published import read_predictions
from tasks.core.runs.run_dir import RunDir
from tasks.inferencer import Inferencer
from tests.conftest import TINY_CHAT_TEMPLATE, build_tiny_model, build_tiny_tokenizer
from tests.making.evaluation_runs import evaluate_run

SUMS = [(a, b) for a in (2, 3, 5) for b in (1, 4, 6, 7)]
HARMONY_TOKENS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]
THINKING_TEMPLATE = TINY_CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
)
HARMONY_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|return|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def question(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def answer(a: int, b: int) -> str:
    return f"I add {b} to {a}, not 9.\n</think>\n\n{a + b}<|im_end|>"


def thinking_tokenizer(markers: str, template: str = THINKING_TEMPLATE) -> Any:
    """The tiny tokenizer with markers as special tokens, as ordinary added tokens, or as plain text."""
    tokenizer = build_tiny_tokenizer()
    if markers != "plain":
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=markers == "special")
    tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def learn(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Let the model learn each answer behind its prompt by heart, until the loss is small."""
    import torch

    width = max(len(prompt) + len(told) for prompt, told in rows)
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(inputs, -100)
    for i, (prompt, told) in enumerate(rows):
        inputs[i, : len(prompt) + len(told)] = torch.tensor([*prompt, *told])
        labels[i, len(prompt) : len(prompt) + len(told)] = torch.tensor(told)
    model.train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(400):
        loss = model(input_ids=inputs, labels=labels).loss
        if loss.item() < 0.005:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    assert loss.item() < 0.02


@pytest.fixture(scope="module", params=["ordinary", "special"])
def thinker_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt twelve sums with thoughts, whose opening marker stands in the prompt."""
    directory: Path = tmp_path_factory.mktemp("thinker") / request.param
    tokenizer = thinking_tokenizer(request.param)
    model = build_tiny_model(tokenizer, initializer_range=0.05)
    prompts = PromptBuilder(tokenizer, max_sequence_length=512)
    asked = prompts.build_all(Example(f"r{i}", question(*pair)) for i, pair in enumerate(SUMS))
    learn(
        model,
        [(prompt.token_ids, ids(tokenizer, answer(*pair))) for prompt, pair in zip(asked, SUMS, strict=True)],
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def overrides(tmp_path: Path, own_cache: Path) -> dict[str, Any]:
    data_path = tmp_path / "sums.jsonl"
    rows = [{"question": question(*pair), "answer": str(sum(pair))} for pair in SUMS]
    data_path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "inferencer.testing_data_id": str(data_path),
        "inferencer.max_new_tokens": 64,
        "inferencer.temperature": 0,
        "inferencer.device": "cpu",
        "inferencer.score_references": False,
        "inferencer.run_name": "sums",
        "pipeline.runs_dir": str(tmp_path / "runs"),
        "pipeline.models_dir": str(tmp_path / "models"),
    }


def infer(overrides: dict[str, Any], **more: Any) -> list[Prediction]:
    changed = {f"inferencer.{name}": value for name, value in more.items()}
    return Inferencer(load_config(None, {**overrides, **changed})).run()


@pytest.mark.parametrize("engine", ["inflight", "generate"])
def test_a_thinking_model_is_scored_by_its_answers(
    thinker_dir: Path, overrides: dict[str, Any], engine: str
) -> None:
    rows = infer(overrides, model=str(thinker_dir), engine=engine)
    assert [found.predicted_answer for found in rows] == [str(sum(pair)) for pair in SUMS]
    assert [found.reasoning for found in rows] == [f"I add {b} to {a}, not 9." for a, b in SUMS]
    assert all(0 < found.metadata.reasoning_tokens < (found.metadata.token_count or 0) for found in rows)
    config = load_config(None, {**overrides, "evaluator.bootstrap_resamples": 200})
    summary = evaluate_run(Path(overrides["pipeline.runs_dir"]) / "sums", None, config.evaluator)
    found = summary.candidate.metric("exact_match")
    assert found is not None
    assert found.value == 1.0
    assert (summary.candidate.reasoning_tokens or 0) > 0


def test_answers_that_end_in_the_thoughts_are_empty_and_counted(
    thinker_dir: Path, overrides: dict[str, Any]
) -> None:
    rows = infer(overrides, model=str(thinker_dir), max_new_tokens=6)
    assert {(found.predicted_answer, found.metadata.is_cut_in_thoughts) for found in rows} == {("", True)}
    assert all(found.reasoning and found.metadata.finish_reason == "length" for found in rows)
    manifest = RunDir(Path(overrides["pipeline.runs_dir"]) / "sums").read_manifest()
    assert manifest.cut_in_thoughts_count == len(SUMS)
    assert manifest.reasoning_tokens == manifest.completion_tokens


@pytest.mark.parametrize("engine", ["inflight", "generate"])
def test_a_stop_string_in_the_thoughts_does_not_end_the_answer(
    thinker_dir: Path, overrides: dict[str, Any], engine: str
) -> None:
    rows = infer(overrides, model=str(thinker_dir), engine=engine, stop_strings=["9", "\n"])
    assert [found.predicted_answer for found in rows] == [str(sum(pair)).partition("9")[0] for pair in SUMS]


def test_a_streamed_answer_comes_without_its_thoughts(thinker_dir: Path, overrides: dict[str, Any]) -> None:
    inferencer = Inferencer(load_config(None, {**overrides, "inferencer.model": str(thinker_dir)}))
    for a, b in SUMS[:3]:
        assert "".join(inferencer.stream_inference(question(a, b))) == str(a + b)


def test_a_stream_that_is_cut_in_its_thoughts_gives_nothing_and_says_so(
    thinker_dir: Path, overrides: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(
        None, {**overrides, "inferencer.model": str(thinker_dir), "inferencer.max_new_tokens": 6}
    )
    assert list(Inferencer(config).stream_inference(question(2, 1))) == []
    assert "cut in its thoughts after 6 tokens" in caplog.text


def test_thoughts_stay_in_the_answer_when_the_setting_says_so(
    thinker_dir: Path, overrides: dict[str, Any]
) -> None:
    rows = infer(overrides, model=str(thinker_dir), thought_markers="none")
    assert all(found.reasoning is None and "not 9" in found.predicted_answer for found in rows)


def test_markers_are_part_of_a_thinking_models_run_key_only(
    thinker_dir: Path, tiny_model_dir: Path, overrides: dict[str, Any]
) -> None:
    def content(model: Path, **more: Any) -> dict[str, Any]:
        changed = {f"inferencer.{name}": value for name, value in more.items()}
        inferencer = Inferencer(load_config(None, {**overrides, "inferencer.model": str(model), **changed}))
        return inferencer.process_dataset(inferencer.load_dataset()).identity.content()

    assert content(thinker_dir)["thoughts"][:2] == ["<think>", "</think>"]
    plain = content(tiny_model_dir, run_name="plain")
    assert not {"thoughts", "thought_markers"} & set(plain)
    with pytest.raises(RunKeyMismatchError, match="thought_markers"):
        content(thinker_dir, thought_markers="none")


# --- scripted answers: exact tokens, whatever the model


SCRIPT: list[str] = []


class Scripted:
    """An engine that writes the script's texts, as tokens."""

    name = "scripted"

    def __init__(self, model: Any, settings: GenerationSettings) -> None:
        self._tokenizer, self._settings = model.tokenizer, settings

    def unsupported(self) -> None:
        return None

    def generate(self, queue: RequestQueue, budget: TokenBudget) -> Iterator[GeneratedRow]:
        while queue:
            for request in queue.take_batch(budget.limit_tokens, budget.max_rows):
                told = ids(self._tokenizer, SCRIPT[request.position % len(SCRIPT)])
                queue.finish(request.position)
                text = self._tokenizer.decode(told, skip_special_tokens=True)
                yield GeneratedRow(request.position, tuple(told), text, "stop", 0.1, 1)


def scripted(tmp_path: Path, overrides: dict[str, Any], tokenizer: Any, texts: list[str]) -> list[Prediction]:
    directory = tmp_path / "scripted"
    build_tiny_model(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    SCRIPT[:] = texts
    return infer(overrides, model=str(directory), engine="tests.prompts.test_thinking_models:Scripted")


@pytest.mark.parametrize("markers", ["special", "ordinary", "plain"])
def test_every_way_in_which_thoughts_are_written_is_read_from_the_tokens(
    markers: str, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    tokenizer = thinking_tokenizer(markers, TINY_CHAT_TEMPLATE + "{# <think></think> #}")
    texts = {
        "<think>\na\n</think>\n\n4<|im_end|>": ("4", "a", False),
        "<think>a</think>4 é 北<|im_end|>": ("4 é 北", "a", False),
        "a\n</think>\n\n4<|im_end|>": ("4", "a", False),
        "<think>\n\n</think>\n\n4<|im_end|>": ("4", None, False),
        "<think>a</think>\n<think>b</think>4<|im_end|>": ("4", "a\n\nb", False),
        "<think>a<|im_end|>": ("", "a", True),
        "4<|im_end|>": ("4", None, False),
        "Use `x`, 4 apples<|im_end|>": ("Use `x`, 4 apples", None, False),
    }
    rows = scripted(tmp_path, overrides, tokenizer, list(texts))
    found = [(row.predicted_answer, row.reasoning, row.metadata.is_cut_in_thoughts) for row in rows]
    assert found[: len(texts)] == list(texts.values())
    lengths = [row.metadata.reasoning_tokens for row in rows[: len(texts)]]
    assert [length > 0 for length in lengths] == [True, True, True, True, True, True, False, False]


def test_channels_are_read_from_the_tokens(tmp_path: Path, overrides: dict[str, Any]) -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(HARMONY_TOKENS, special_tokens=True)
    tokenizer.chat_template = HARMONY_TEMPLATE
    final = "<|end|><|start|>assistant<|channel|>final<|message|>"
    texts = {
        f"<|channel|>analysis<|message|>a{final}4<|return|>": ("4", "a", False),
        f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b{final}4": (
            "4", "a\n\nb", False,
        ),
        "<|channel|>final<|message|>4<|return|>": ("4", None, False),
        "<|channel|>analysis<|message|>a": ("", "a", True),
        "4<|return|>": ("4", None, False),
    }  # fmt: skip
    rows = scripted(tmp_path, overrides, tokenizer, list(texts))
    found = [(row.predicted_answer, row.reasoning, row.metadata.is_cut_in_thoughts) for row in rows]
    assert found[: len(texts)] == list(texts.values())


def test_thoughts_of_a_model_that_declares_no_markers_are_split_by_the_well_known_ones(
    tiny_tokenizer: Any, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    texts = ["<think>a</think>4<|im_end|>", "<reasoning>a</reasoning>\n4<|im_end|>"]
    rows = scripted(tmp_path, overrides, tiny_tokenizer, texts)
    assert [(row.predicted_answer, row.reasoning) for row in rows[:2]] == [("4", "a")] * 2


def test_rows_without_thoughts_are_published_as_before(
    tiny_tokenizer: Any, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    scripted(tmp_path, overrides, tiny_tokenizer, ["4<|im_end|>"])
    run = RunDir(Path(overrides["pipeline.runs_dir"]) / "sums")
    line = json.loads(run.predictions_path.read_text().splitlines()[0])
    assert "reasoning" not in line
    assert not {"reasoning_tokens", "is_cut_in_thoughts", "thought_markers"} & set(line["metadata"])
    assert "reasoning" not in run.ledger_path.read_text()


def test_a_ledger_from_before_is_read_and_gone_on_with(
    tiny_tokenizer: Any, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    scripted(tmp_path, overrides, tiny_tokenizer, ["4<|im_end|>"])
    run = RunDir(Path(overrides["pipeline.runs_dir"]) / "sums")
    lines = run.ledger_path.read_text().splitlines(keepends=True)
    run.ledger_path.write_text("".join(lines[:5]))
    run.manifest_path.unlink()
    rows = scripted(tmp_path, overrides, tiny_tokenizer, ["<think>a</think>5<|im_end|>"])
    assert [found.predicted_answer for found in rows].count("4") == 5
    assert [found.predicted_answer for found in rows].count("5") == len(SUMS) - 5
    assert list(read_predictions(run.predictions_path)) == rows


# --- the reader and the gate


def test_an_engine_that_knows_no_tokens_has_its_text_split(tiny_tokenizer: Any) -> None:
    reader = AnswerReader(tiny_tokenizer)
    assert reader.read("<think>a</think>4", (), ()).text == "4"
    assert AnswerReader(tiny_tokenizer, ()).read("<think>a</think>4", (), ()).text == "<think>a</think>4"


@pytest.mark.parametrize("text", ["4 apples", "<table>", "<", "", "<think>a</think> 4", "<think>a</think>"])
def test_a_gate_lets_through_the_same_answer_as_the_reader_reads(text: str) -> None:
    tokenizer = thinking_tokenizer("plain", TINY_CHAT_TEMPLATE)
    gate, told = AnswerGate(tokenizer, None, ()), ids(tokenizer, text)
    passed = [token_id for one in told for token_id in gate.pass_on([one])]
    streamed = gate.first_piece + tokenizer.decode([*passed, *gate.end()])
    expected = AnswerReader(tokenizer).read(text, told, ()).text
    assert streamed.lstrip() == expected
