"""A judge on this machine: our engine answers the same prompts, and each only once."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from tasks.core.config import EvaluatorConfig
from tasks.core.errors import EvaluationError
from tasks.core.metrics.judge.constrained_replies import matcher_of
from tasks.core.metrics.judge.local import LocalJudge
from tasks.core.metrics.judge.prompts import (
    JudgePrompt,
    Verdict,
    accuracy_prompt,
    factual_prompt,
    preference_prompt,
    read_verdict,
    relevancy_prompt,
)
from tasks.core.metrics.judge.replies import Reply
from tasks.core.metrics.models.scoring_models import ScoringModels
from tasks.server.secret_blocks import judge_key_of
from tests.making.evaluation_runs import evaluate_run, row, write_run

Short = Annotated[str, Field(max_length=8)]


class Rated(Verdict):
    """A rating whose reason must end soon: a random model ends no sentence by itself."""

    reason: Short
    rating: Literal[0, 1, 2]


class Preferred(Verdict):
    """A preference whose reason must end soon."""

    reason: Short
    better: Literal["first", "second", "tie"]


def replies_of(model_dir: Path, prompts: list[JudgePrompt], max_tokens: int) -> list[Reply]:
    judge, replies = LocalJudge(str(model_dir), max_tokens=max_tokens), dict[int, Reply]()
    judge.reply(prompts, replies.__setitem__)
    return [replies[position] for position in range(len(prompts))]


def test_a_model_that_knows_nothing_of_json_gives_verdicts_of_the_asked_form(tiny_model_dir: Path) -> None:
    prompts = [
        accuracy_prompt("what?", "this", "that"),
        preference_prompt("what?", "this", "that", ()),
        accuracy_prompt("", "", ""),
    ]
    forms: list[type[Verdict]] = [Rated, Preferred, Rated]
    short = [replace(prompt, verdict=form) for prompt, form in zip(prompts, forms, strict=True)]
    for prompt, reply in zip(short, replies_of(tiny_model_dir, short, 200), strict=True):
        assert reply.failure is None
        assert isinstance(read_verdict(reply.text, prompt.verdict), prompt.verdict)
        assert set(json.loads(reply.text)) == set(prompt.verdict.model_fields)


@pytest.mark.parametrize(
    ("prompt", "verdict"),
    [
        (
            factual_prompt("q", "a", "r"),
            {
                "answer_claims": [{"claim": "Ä \\ 火", "supported": True}],
                "reference_claims": [{"claim": "b", "covered": False}, {"claim": "", "covered": True}],
            },
        ),
        (accuracy_prompt("q", "a", "r"), {"reason": 'so "said"', "rating": 2}),
        (relevancy_prompt("a"), {"questions": ["one?", "two?"], "noncommittal": False}),
        (preference_prompt("q", "a", "b", ()), {"reason": "so", "better": "tie"}),
    ],
    ids=["facts", "accuracy", "relevancy", "preference"],
)
def test_every_verdict_can_be_written_within_its_form(
    tiny_tokenizer: Any, prompt: JudgePrompt, verdict: dict[str, Any]
) -> None:
    from llguidance.hf import from_tokenizer

    vocabulary = from_tokenizer(tiny_tokenizer)
    text = json.dumps(verdict, ensure_ascii=False)
    tokens = tiny_tokenizer(text, add_special_tokens=False).input_ids
    matcher = matcher_of(vocabulary, prompt.schema)
    assert matcher.consume_tokens(tokens) and matcher.is_accepting(), matcher.get_error()
    assert not matcher_of(vocabulary, prompt.schema).consume_tokens(tokens[:-1] + tokens[:1])


def test_a_verdict_does_not_depend_on_the_prompts_beside_it(tiny_model_dir: Path) -> None:
    prompts = [replace(accuracy_prompt("q" * n, "a", "r"), verdict=Rated) for n in (1, 30, 5)]
    together = replies_of(tiny_model_dir, prompts, 200)
    assert [replies_of(tiny_model_dir, [prompt], 200)[0] for prompt in prompts] == together


def test_the_limit_of_a_local_judge_is_the_one_that_is_set(tiny_model_dir: Path) -> None:
    settings = {"metrics": ("answer_accuracy",), "llm": f"local:{tiny_model_dir}"}
    for given, told in (({}, "768 tokens"), ({"judge_max_tokens": 4096}, "4096 tokens")):
        backend = ScoringModels(EvaluatorConfig.model_validate({**settings, **given}))._backend()
        assert told in backend.cut_reason


def test_a_reply_that_is_cut_is_reported_and_not_generated_again(
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


@pytest.mark.usefixtures("prefect_api")
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
