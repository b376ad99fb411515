"""The Inferencer: every row once, in order, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.config import Config, load_config
from tasks.core.errors import ConfigError, DataError, RunKeyMismatchError, RunLockedError, StorageError
from tasks.core.generation.engines.inflight import InflightEngine
from tasks.core.records import Message, Prediction
from tasks.core.runs.published import read_predictions
from tasks.core.runs.run_dir import RunDir
from tasks.inferencer import Inferencer
from tests.making.evaluation_runs import evaluate_run
from tests.making.model_runs import make_run
from tests.making.rows import first_row
from tests.making.warm.python import WarmPython

ROWS = 24


@pytest.fixture
def questions_path(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"How many {'legs ' * (n % 7)}has dog {n}?", "answer": str(n)} for n in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def overrides(tmp_path: Path, tiny_model_dir: Path, questions_path: Path, own_cache: Path) -> dict[str, Any]:
    return {
        "inferencer.model": str(tiny_model_dir),
        "inferencer.testing_data_id": str(questions_path),
        "inferencer.max_new_tokens": 8,
        "inferencer.temperature": 0,
        "inferencer.device": "cpu",
        "pipeline.runs_dir": str(tmp_path / "runs"),
        "pipeline.models_dir": str(tmp_path / "models"),
    }


def config(overrides: dict[str, Any], **more: Any) -> Config:
    changed = {f"inferencer.{key}": value for key, value in more.items()}
    return load_config(None, {**overrides, **changed})


def without_timings(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["metadata"]["inference_time"], row["metadata"]["batch_size"]
    return rows


def test_every_row_is_published_once_in_dataset_order(
    overrides: dict[str, Any], questions_path: Path
) -> None:
    predictions = Inferencer(config(overrides)).run()
    asked = [json.loads(line)["question"] for line in questions_path.read_text().splitlines()]
    assert [prediction.question for prediction in predictions] == asked
    assert [prediction.ground_truth for prediction in predictions] == [str(n) for n in range(ROWS)]
    assert len({prediction.id for prediction in predictions}) == ROWS
    assert all(prediction.metadata.token_count for prediction in predictions)


def test_a_conversation_is_published_with_what_came_before_its_question(
    overrides: dict[str, Any], questions_path: Path
) -> None:
    turns = [
        {"role": role, "content": content}
        for role, content in (
            ("system", "Be short."),
            ("user", "Rome"),
            ("assistant", "Italy"),
            ("user", "Bern"),
        )
    ]
    questions_path.write_text("\n".join(json.dumps({"messages": t}) for t in (turns, turns[3:])))
    conversation, question = Inferencer(config(overrides)).run()
    assert conversation.earlier_turns == (Message("user", "Rome"), Message("assistant", "Italy"))
    assert (conversation.system_prompt, conversation.question) == ("Be short.", "Bern")
    assert question.earlier_turns == ()


def test_the_manifest_says_what_was_run(overrides: dict[str, Any], tiny_model_dir: Path) -> None:
    manifest = Inferencer(config(overrides)).infer()
    assert manifest.row_count == ROWS
    assert manifest.error_count == 0
    assert manifest.engine == "inflight"
    assert manifest.identity.model.model_id == str(tiny_model_dir)
    assert manifest.completion_tokens > 0
    assert manifest.reference_perplexity is not None
    assert manifest.reference_perplexity > 1
    assert manifest.library_versions["torch"]


def test_the_second_run_generates_nothing_and_leaves_the_file_as_it_is(overrides: dict[str, Any]) -> None:
    first = Inferencer(config(overrides))
    manifest = first.infer()
    run = RunDir(Path(overrides["pipeline.runs_dir"]) / manifest.run_name)
    before = run.predictions_path.read_bytes(), run.predictions_path.stat().st_mtime_ns

    class Forbidden(Inferencer):
        def load_model_and_tokenizer(self) -> Any:
            raise AssertionError("no model is needed")

    assert Forbidden(config(overrides)).infer() == manifest
    assert (run.predictions_path.read_bytes(), run.predictions_path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("changed", "difference"),
    [({"max_new_tokens": 9}, "max_new_tokens: 8 -> 9"), ({"temperature": 0.5}, "temperature: 1.0 -> 0.5")],
)
def test_with_another_setting_it_refuses_to_mix_and_says_what_differs(
    overrides: dict[str, Any], changed: dict[str, Any], difference: str
) -> None:
    Inferencer(config(overrides)).infer()
    with pytest.raises(RunKeyMismatchError) as caught:
        Inferencer(config(overrides, **changed)).infer()
    assert difference in str(caught.value)
    assert "run_name_suffix" in str(caught.value)


def test_batch_size_engine_and_device_limits_are_no_other_setting(overrides: dict[str, Any]) -> None:
    manifest = Inferencer(config(overrides, batch_size=2)).infer()
    assert Inferencer(config(overrides, batch_size=7, engine="generate")).infer() == manifest


def test_a_run_that_an_engine_of_earlier_versions_answered_is_read_and_one_it_began_is_finished(
    overrides: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=r'"continuous" is gone.*write "auto" or "inflight"'):
        config(overrides, engine="continuous")
    settings = config(overrides)
    manifest = Inferencer(settings).infer()
    run = RunDir(Path(overrides["pipeline.runs_dir"]) / manifest.run_name)
    old = manifest.model_copy(update={"engine": "continuous"})
    run.manifest_path.write_text(old.model_dump_json())
    run.sessions_path.write_text(run.sessions_path.read_text().replace('"inflight"', '"continuous"'))
    assert Inferencer(settings).infer() == old
    assert evaluate_run(run.path, None, settings.evaluator).candidate.rows == ROWS
    run.manifest_path.unlink()
    run.ledger_path.write_text("".join(run.ledger_path.read_text().splitlines(keepends=True)[:7]))
    finished = Inferencer(settings).infer()
    assert (finished.run_key, finished.engine) == (old.run_key, "inflight")
    assert len(list(read_predictions(run.predictions_path))) == ROWS


def test_other_rows_in_the_same_folder_are_refused(overrides: dict[str, Any], questions_path: Path) -> None:
    Inferencer(config(overrides)).infer()
    questions_path.write_text(json.dumps({"question": "Another one?", "answer": "1"}))
    with pytest.raises(RunKeyMismatchError, match="rows: "):
        Inferencer(config(overrides)).infer()


def test_unanswerable_rows_become_error_rows_with_their_reason(
    overrides: dict[str, Any], questions_path: Path
) -> None:
    rows = [
        {"question": "Fine?", "answer": "a"},
        {"question": "   ", "answer": "b"},
        {"question": 7, "answer": "c"},
    ]
    questions_path.write_text("\n".join(map(json.dumps, rows)))
    fine, empty, number = Inferencer(config(overrides)).run()
    assert fine.error is None
    assert empty.error
    assert number.error
    assert empty.predicted_answer == number.predicted_answer == ""
    assert number.metadata.finish_reason == "error"


def test_equal_questions_get_rows_of_their_own_and_equal_answers(
    overrides: dict[str, Any], questions_path: Path
) -> None:
    questions_path.write_text("\n".join([json.dumps({"question": "Same?", "answer": "a"})] * 5))
    predictions = Inferencer(config(overrides)).run()
    assert len({prediction.id for prediction in predictions}) == 5
    assert len({prediction.predicted_answer for prediction in predictions}) == 1


def test_a_tampered_file_is_published_again_from_the_ledger_without_a_model_answer(
    overrides: dict[str, Any],
) -> None:
    manifest = Inferencer(config(overrides)).infer()
    run = RunDir(Path(overrides["pipeline.runs_dir"]) / manifest.run_name)
    original = run.predictions_path.read_bytes()
    ledger = run.ledger_path.read_bytes()
    run.predictions_path.write_bytes(original[:100])
    Inferencer(config(overrides)).infer()
    assert run.predictions_path.read_bytes() == original
    assert run.ledger_path.read_bytes() == ledger


def test_a_runs_model_is_searched_with_prefix_and_suffix_then_by_its_bare_name(
    overrides: dict[str, Any], tmp_path: Path, tiny_model_dir: Path
) -> None:
    def chosen() -> str:
        named = {"model": None, "run_name": "legs", "run_name_prefix": "a-", "run_name_suffix": "-b"}
        return Path(Inferencer(config(overrides, **named)).discover().chosen.model_id).name

    models_dir = tmp_path / "models"
    make_run(models_dir, "newest", base=tiny_model_dir, finished_at="2026-05-01T00:00:00+00:00")
    make_run(models_dir, "legs", base=tiny_model_dir)
    assert chosen() == "legs"
    make_run(models_dir, "a-legs-b", base=tiny_model_dir)
    assert chosen() == "a-legs-b"


def test_a_folder_of_runs_that_is_a_file_is_told(overrides: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError, match="a part of this path is a file"):
        Inferencer(config(overrides)).infer()


def test_a_dataset_that_was_not_processed_is_refused_in_words(overrides: dict[str, Any]) -> None:
    inferencer = Inferencer(config(overrides))
    with pytest.raises(TypeError, match="takes what process_dataset"):
        inferencer.generate_responses(inferencer.load_dataset())


def test_a_second_writer_is_told_who_holds_the_run(overrides: dict[str, Any]) -> None:
    inferencer = Inferencer(config(overrides))
    prepared = inferencer.process_dataset(inferencer.load_dataset())
    with prepared.run.locked():
        script = (
            "import sys\nfrom pathlib import Path\nfrom tasks.core.runs.run_dir import RunDir\n"
            "from tasks.core.errors import RunLockedError\n"
            "try:\n    RunDir(Path(sys.argv[1])).locked().__enter__()\n"
            "except RunLockedError as exc:\n    print(exc)"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, str(prepared.run.path)], capture_output=True, text=True, check=True
        )
    assert f"process {os.getpid()}" in run.stdout
    assert "wait for it to end" in run.stdout


def test_the_lock_is_free_again_after_its_holder(overrides: dict[str, Any]) -> None:
    inferencer = Inferencer(config(overrides))
    prepared = inferencer.process_dataset(inferencer.load_dataset())
    with prepared.run.locked(), pytest.raises(RunLockedError), RunDir(prepared.run.path).locked():
        pass
    with RunDir(prepared.run.path).locked():
        pass


def start_and_kill(overrides: dict[str, Any], after_rows: int) -> int:
    """Start a run in another process and kill it after some rows; returns the rows it reported."""
    reader, writer = os.pipe()
    with Path(os.devnull).open() as nothing:
        process = WarmPython(
            ["-m", "tests.making.killed_inference", json.dumps(overrides), "0.1"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            streams=(nothing.fileno(), writer, 2),
        )
    os.close(writer)
    rows = 0
    with os.fdopen(reader) as printed:
        for line in printed:
            rows += line.strip() == "row"
            if rows >= after_rows:
                process.kill()
                break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    return rows


def run_out_of_memory_once(monkeypatch: pytest.MonkeyPatch, after_rows: int) -> None:
    """Let the first attempt of the in-flight engine fail as the CUDA allocator does."""
    plain, failures = InflightEngine.generate, iter([True])

    def failing(self: InflightEngine, queue: Any, budget: Any) -> Iterator[Any]:
        for count, row in enumerate(plain(self, queue, budget), start=1):
            yield row
            if count >= after_rows and queue.unfinished > len(queue) and next(failures, False):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(InflightEngine, "generate", failing)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_killed_run_that_also_runs_out_of_memory_ends_in_the_file_of_an_undisturbed_one(
    overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    overrides["inferencer.temperature"] = 0.9 if sampled else 0
    undisturbed, smaller = (
        Inferencer(
            config({**overrides, "pipeline.runs_dir": str(tmp_path / name)}, batch_size=batch_size)
        ).infer()
        for name, batch_size in (("undisturbed", 32), ("smaller", 4))
    )
    kept = []
    for batch_size in (4, 9):
        start_and_kill(
            {**overrides, "inferencer.batch_size": batch_size},
            after_rows=random.Random(batch_size).randint(3, 8),
        )
        run = RunDir(Path(overrides["pipeline.runs_dir"]) / undisturbed.run_name)
        kept.append(run.ledger_path.read_bytes().count(b"\n"))
        assert not run.manifest_path.exists()
    run_out_of_memory_once(monkeypatch, after_rows=2)
    manifest = Inferencer(config(overrides, batch_size=32)).infer()
    assert 0 < kept[0] < kept[1] < ROWS
    assert len(manifest.memory_events) == 1
    assert manifest.run_key == undisturbed.run_key
    finished = run.ledger_path.read_bytes()
    assert finished.count(b"\n") == ROWS
    other = RunDir(tmp_path / "undisturbed" / undisturbed.run_name)
    assert without_timings(run.predictions_path) == without_timings(other.predictions_path)
    other = RunDir(tmp_path / "smaller" / smaller.run_name)
    assert without_timings(run.predictions_path) == without_timings(other.predictions_path)


def test_progress_is_reported_with_totals(overrides: dict[str, Any]) -> None:
    seen: list[tuple[int, int]] = []
    Inferencer(
        config(overrides), on_progress=lambda progress: seen.append((progress.rows_done, progress.rows_total))
    ).infer()
    assert seen[-1] == (ROWS, ROWS)


def test_streaming_yields_the_answer_that_a_run_gives(
    overrides: dict[str, Any], questions_path: Path
) -> None:
    inferencer = Inferencer(config(overrides))
    first = inferencer.run()[0]
    pieces = list(inferencer.stream_inference(first.question))
    assert "".join(pieces) == first.predicted_answer
    conversation = list(inferencer.stream_inference([Message("user", first.question)]))
    assert "".join(conversation) == first.predicted_answer


def test_streaming_can_be_closed_early(overrides: dict[str, Any]) -> None:
    inferencer, passes = Inferencer(config(overrides, max_new_tokens=200)), []
    inferencer.load_model_and_tokenizer().model.register_forward_pre_hook(lambda *_: passes.append(1))
    pieces = inferencer.stream_inference("How many legs has a dog?")
    next(pieces)
    assert isinstance(pieces, Generator)
    pieces.close()
    assert 1 <= len(passes) < 200
    assert "tuneproof-stream" not in [thread.name for thread in threading.enumerate()]


def test_generation_can_be_replaced_by_a_subclass(overrides: dict[str, Any]) -> None:
    class OnlyFirst(Inferencer):
        def examples(self, dataset: Any) -> Any:
            yield next(iter(super().examples(dataset)))

    assert len(OnlyFirst(config(overrides)).run()) == 1


def test_files_of_the_original_pipeline_are_read(tmp_path: Path) -> None:
    path = tmp_path / "inferencer_output.jsonl"
    row = {"system_prompt": "s", "user_prompt": "q", "assistant_response": "a", "ground_truth": "t"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    first, second = read_predictions(path)
    assert (first.question, first.predicted_answer, first.ground_truth) == ("q", "a", "t")
    assert first.system_prompt == "s"
    assert first.id != second.id
    assert isinstance(first, Prediction)


def test_lines_of_other_tools_need_no_id_and_may_hold_numbers_nulls_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows: list[dict[str, Any]] = [
        {"question": "q", "predicted_answer": 4, "ground_truth": 5},
        {"question": "q", "predicted_answer": 4, "ground_truth": 5},
        {"user_prompt": "q", "assistant_response": None, "ground_truth": " "},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = read_predictions(path)
    assert (first.predicted_answer, first.ground_truth) == ("4", "5")
    assert first.id.removesuffix("-0") == second.id.removesuffix("-1")
    assert (third.predicted_answer, third.ground_truth) == ("", None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": "q"}', "it has neither predicted_answer nor assistant_response"),
        ('{"question": ["q"], "predicted_answer": "a"}', "question: Input should be a valid string"),
        ('["q", "a"]', "it is no object"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "answers.jsonl").write_text(line)
    with pytest.raises(DataError, match=f"line 1 is not a prediction: {problem}"):
        list(read_predictions(tmp_path / "answers.jsonl"))


def test_prompts_that_were_cut_are_told_once_with_their_number(
    overrides: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        inferencer = Inferencer(config(overrides, max_sequence_length=28))
        cut = inferencer.infer().truncated_prompt_count
        assert 0 < cut < ROWS
        told = [record.getMessage() for record in caplog.records if "were cut" in record.getMessage()]
        assert len(told) == 1 and told[0].startswith(
            f"{cut} of {ROWS} prompts were cut on the left by up to "
        )
        list(inferencer.stream_inference("How many legs " * 9))
        assert "the question was cut on the left by" in caplog.text


def test_a_missing_reference_column_is_told_once(
    overrides: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bare.jsonl").write_text('{"question": "How many legs has a dog?"}\n')
    with caplog.at_level(logging.WARNING):
        Inferencer(config(overrides, testing_data_id=str(tmp_path / "bare.jsonl"))).infer()
    assert caplog.text.count("There is no column 'answer'") == 1


def test_a_line_that_is_no_prediction_is_named(tmp_path: Path) -> None:
    path = tmp_path / "inferencer_output.jsonl"
    path.write_text('{"question": "q"}\n')
    with pytest.raises(DataError, match="line 1 is not a prediction"):
        list(read_predictions(path))


def test_the_reference_perplexity_is_that_of_the_models_own_loss(
    overrides: dict[str, Any], tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """Against transformers' loss with the same labels, row by row."""
    import math

    import torch

    from tasks.core.prompts.tokens import PromptBuilder

    inferencer = Inferencer(config(overrides))
    manifest = inferencer.infer()
    builder = PromptBuilder(tiny_tokenizer, max_sequence_length=4096)
    total, tokens = 0.0, 0
    for example in inferencer.examples(inferencer.load_dataset()):
        row = first_row(builder, example)
        labels = torch.tensor([row.labels])
        count = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += float(tiny_model(torch.tensor([row.input_ids]), labels=labels).loss) * count
        tokens += count
    assert manifest.reference_tokens == tokens
    assert manifest.reference_perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
