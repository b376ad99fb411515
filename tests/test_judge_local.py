"""A judge on this machine: our engine answers the same prompts, and each only once."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tasks.core.config import EvaluatorConfig
from tasks.core.errors import EvaluationError
from tasks.core.evaluation.evaluate import evaluate_run
from tasks.core.evaluation.judge_local import LocalJudge
from tasks.core.evaluation.judge_prompts import accuracy_prompt, factual_prompt
from tasks.core.evaluation.judge_replies import Reply
from tasks.secret_blocks import judge_key_of
from tests.evaluation_runs import row, write_run


def test_the_local_judges_replies_are_those_of_the_model_to_the_same_messages(
    tiny_model_dir: Path, tiny_model: object, tiny_tokenizer: object
) -> None:
    prompts = [
        factual_prompt("q", "a", "r"),
        accuracy_prompt("what?", "this", "that"),
        factual_prompt("", "", ""),
    ]
    judge, replies = LocalJudge(str(tiny_model_dir), max_tokens=8), dict[int, Reply]()
    judge.reply(prompts, replies.__setitem__)
    assert sorted(replies) == [0, 1, 2]
    for position, prompt in enumerate(prompts):
        chat = [{"role": message.role, "content": message.content} for message in prompt.messages]
        text = tiny_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)  # type: ignore[attr-defined]
        ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # type: ignore[operator]
        answer = tiny_model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]  # type: ignore[attr-defined]
        expected = tiny_tokenizer.decode(answer, skip_special_tokens=True)  # type: ignore[attr-defined]
        assert (replies[position].text, replies[position].input_tokens) == (expected, ids.shape[1])


def test_nonsense_of_a_local_judge_is_reported_and_not_generated_again(
    tiny_model_dir: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", [row(i, f"{i}", "1") for i in range(3)])
    settings = EvaluatorConfig(
        metrics=("answer_accuracy", "exact_match"),
        llm=f"local:{tiny_model_dir}",
        judge_max_tokens=8,
        bootstrap_resamples=100,
    )
    first = evaluate_run(run, None, settings)
    metric = first.candidate.metric("answer_accuracy")
    assert metric is not None and metric.unscored_rows == 3
    assert all(reason.startswith("judge: its reply") for reason in metric.unscored_reasons)
    assert first.judge is not None and first.judge.calls > 0
    assert first.judge.endpoint is None and first.judge.cost_dollars is None

    def no_model(_: object) -> None:
        raise AssertionError("the model was loaded again")

    loading = importlib.import_module("tasks.core.models.loading")
    monkeypatch.setattr(loading, "load_model_and_tokenizer", no_model)
    second = evaluate_run(run, None, settings)
    assert second.judge is not None and second.judge.calls == 0
    assert second.candidate.metrics == first.candidate.metrics


def test_the_key_may_be_kept_in_a_prefect_secret_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.blocks.system import Secret

    asked: list[str] = []

    def load(name: str, **_: object) -> Secret[str]:
        asked.append(name)
        if name != "my-judge":
            raise ValueError("Unable to find block document")
        return Secret[str](value="geheim")

    monkeypatch.setattr(Secret, "load", load)
    judged = {"metrics": ("answer_accuracy",), "llm": "gpt"}
    key = judge_key_of(EvaluatorConfig.model_validate({**judged, "judge_api_key": "secret:my-judge"}))
    assert key is not None and key.get_secret_value() == "geheim"
    with pytest.raises(EvaluationError, match="does not exist"):
        judge_key_of(EvaluatorConfig.model_validate({**judged, "judge_api_key": "secret:other"}))
    assert judge_key_of(EvaluatorConfig(metrics=("f1",), judge_api_key="secret:other")) is None
    assert asked == ["my-judge", "other"]
