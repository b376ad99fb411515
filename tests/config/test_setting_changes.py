"""What each setting changes: declared once, and identities of runs, trainings and evaluations follow from it."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.core.config import EvaluatorConfig, FineTunerConfig, InferencerConfig
from tasks.core.config.changes import changes_of
from tasks.core.config.sections import SECTIONS, Section
from tasks.core.evaluation.evaluate import settings_of
from tasks.core.evaluation.summary import EvaluationSettings
from tasks.core.generation.settings import generation_settings
from tasks.core.records import GenerationSettings, ModelIdentity, RunIdentity
from tasks.core.training.identity import TrainingIdentity

IDENTITY_OF_THE_DEFAULTS = (
    '{"long_prompts": "truncate_left", "max_sequence_length": 4096, "full_finetuning": false, "rank": 16, '
    '"lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear", "bias": "none", '
    '"use_rslora": false, "loftq_config": null, "epochs": 3.0, "learning_rate": 0.0003, "warmup_steps": 5, '
    '"lr_scheduler_type": "linear", "optimizer": "adamw_torch", "weight_decay": 0.01, "seed": 42, '
    '"packing": false, "train_on_responses_only": true, "question_part": null, "answer_part": null, '
    f'"base weights": "{"2" * 64}", "base adapter": null, "quantization": "none", "dtype": "float32", '
    f'"chat template": "{"1" * 64}", "training rows": "{"0" * 64}", "validation rows": null, '
    '"rows in an optimizer step": 8}'
)
"""As written before settings declared what they change."""


def training(validation: bool = False, **settings: Any) -> dict[str, Any]:
    template = SimpleNamespace(writes_more=False, end=None)
    data: Any = SimpleNamespace(
        train=SimpleNamespace(sha256="0" * 64, earlier_count=0),
        validation=SimpleNamespace(sha256="3" * 64) if validation else None,
        chat_template_sha256="1" * 64,
        template=template,
    )
    base: Any = SimpleNamespace(weights_sha256="2" * 64, adapter_sha256=None, quantization="none")
    return TrainingIdentity.of(FineTunerConfig(**settings), base, data, "float32").settings


def run(**settings: Any) -> RunIdentity:
    config = InferencerConfig(**settings)
    return RunIdentity(
        model=ModelIdentity(
            model_id="m",
            weights_sha256="2" * 64,
            dtype="float32",
            chat_template_sha256="1" * 64,
            vocab_size=9,
        ),
        rows_sha256="0" * 64,
        row_count=1,
        generation=generation_settings(config),
        max_sequence_length=config.max_sequence_length,
        long_prompts=config.long_prompts,
        chat_template_kwargs=config.chat_template_kwargs or {},
    )


@pytest.mark.parametrize("section", SECTIONS.values(), ids=list(SECTIONS))
def test_every_key_declares_what_it_changes(section: type[Section]) -> None:
    assert changes_of(section).keys() == section.model_fields.keys()


def test_a_key_that_does_not_declare_it_is_an_error() -> None:
    class Undeclared(Section):
        forgotten: int = 1

    with pytest.raises(TypeError, match=r"Undeclared\.forgotten does not declare"):
        changes_of(Undeclared)


# ---------------------------------------------------------------- trainings


def test_the_identity_of_a_training_is_written_as_before() -> None:
    assert json.dumps(training()) == IDENTITY_OF_THE_DEFAULTS


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({"full_finetuning": True, "rank": 3}, "c9d2c8cc29243bf5"),
        (
            {
                "validation": True, "save_steps": 7, "use_dora": True, "warmup_ratio": 0.1,
                "report_to": "all", "dtype": "float16", "seed": 1,
            },
            "73f66c8511c02daf",
        ),
        (
            {
                "loftq_config": {"loftq_bits": 4}, "target_modules": ("a", "b"),
                "modules_to_save": ("lm_head",), "long_prompts": "refuse", "max_rows": 5,
                "device_train_batch_size": 1,
            },
            "a9a4ce41d8372a50",
        ),
        (
            {
                "bias": "all", "use_rslora": True, "lora_dropout": 0.0, "optimizer": "sgd", "packing": True,
                "question_part": "q", "answer_part": "a", "early_stopping_patience": 2,
                "validation_data_id": "v", "train_on_responses_only": False,
            },
            "056aea513545ea50",
        ),
    ],
)  # fmt: skip
def test_trainings_with_other_settings_keep_their_identity_too(settings: dict[str, Any], digest: str) -> None:
    text = json.dumps(training(**settings), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_what_changes_weights_is_in_a_trainings_identity_or_within_a_named_part_of_it() -> None:
    identity = training(validation=True, save_steps=7)
    for name, changes in changes_of(FineTunerConfig).items():
        if changes.effect != "weights":
            assert name not in identity
        elif changes.within is not None:
            assert changes.within in identity and name not in identity.keys() - {changes.within}, name
        else:
            assert (name in identity) != changes.came_later, name


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, "99dff9c5c7c4d9ba"),
        ({"temperature": 0}, "5317348b35c4a4b7"),
        (
            {
                "temperature": 0, "num_beams": 3, "length_penalty": 1.5, "early_stopping": True,
                "max_new_tokens": 9,
            },
            "bf3a9558db0cc33c",
        ),
        (
            {
                "top_k": 5, "top_p": 0.5, "min_p": None, "seed": 7, "repetition_penalty": 1.2,
                "stop_strings": ("x",), "min_new_tokens": 2,
            },
            "798d886c1cdc556e",
        ),
        (
            {
                "thought_markers": "none", "batch_size": 3, "num_shards": 4, "long_prompts": "refuse",
                "max_sequence_length": 1024,
            },
            "e6ba3300e2cf5359",
        ),
        (
            {
                "thought_markers": ("<a>", "</a>"), "chat_template_kwargs": {"enable_thinking": False},
                "engine": "generate",
            },
            "fc9189374921ba6b",
        ),
    ],
)  # fmt: skip
def test_the_key_of_a_run_is_the_one_it_had(settings: dict[str, Any], key: str) -> None:
    assert run(**settings).run_key.startswith(key)


def test_the_identities_of_runs_with_many_settings_are_written_as_before() -> None:
    """Digest of keys and files of 768 runs, made before the settings of a run followed from what keys declare."""
    digest = hashlib.sha256()
    for temperature, sampled, beams, seed, penalty, minimum, markers, stops, model in product(
        (0.0, 0.7), (None, True, False), (1, 2), (0, 42), (None, 1.2), (None, 0.1),
        ("auto", ("<a>", "</a>")), ((), ("x",)), ({}, {"thought_markers": ("<think>", "</think>")}),
    ):  # fmt: skip
        made = run(
            temperature=temperature, do_sample=sampled, num_beams=beams, seed=seed, repetition_penalty=penalty,
            min_p=minimum, thought_markers=markers, stop_strings=stops, length_penalty=2.0, top_k=5, top_p=0.9,
            early_stopping=True,
        )  # fmt: skip
        made = made.model_copy(update={"model": made.model.model_copy(update=model)})
        digest.update(f"{made.run_key} {made.model_dump_json()}".encode())
        assert RunIdentity.model_validate_json(made.model_dump_json()).run_key == made.run_key
    assert digest.hexdigest() == "8568ffb24167ae4ecb55c5dcd424fb8c711b5ce53aa30025b041684702c101a5"


def test_what_changes_answers_is_in_a_runs_identity_or_within_a_named_part_of_it() -> None:
    content = run(thought_markers=("<a>", "</a>"), chat_template_kwargs={"x": 1}).content()
    for name, changes in changes_of(InferencerConfig).items():
        if changes.effect == "answers":
            assert (changes.within or name) in content, name
        else:
            assert name not in content


OTHER_VALUES: dict[str, dict[str, Any]] = {
    "do_sample": {"do_sample": False},
    "temperature": {"temperature": 0.3},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.2},
    "length_penalty": {"num_beams": 2, "length_penalty": 2.0},
    "early_stopping": {"num_beams": 2, "early_stopping": True},
    "stop_strings": {"stop_strings": ("x",)},
    "thought_markers": {"thought_markers": "none"},
    "long_prompts": {"long_prompts": "refuse"},
    "chat_template_kwargs": {"chat_template_kwargs": {"x": 1}},
}
"""Of keys for which one more than the default says nothing."""


def test_each_setting_that_changes_answers_makes_another_run() -> None:
    declared = changes_of(InferencerConfig).items()
    own = {name for name, changes in declared if changes.effect == "answers" and changes.within is None}
    assert own > OTHER_VALUES.keys()
    for name in own:
        settings = OTHER_VALUES.get(name) or {name: other_than(InferencerConfig, name)}
        without = {key: value for key, value in settings.items() if key != name}
        assert run(**settings).run_key != run(**without).run_key, name


# ---------------------------------------------------------------- evaluations

JUDGED: dict[str, Any] = {"metrics": ("answer_accuracy", "semantic_similarity", "bert_score"), "llm": "judge"}
OTHER_FIGURES: dict[str, Any] = {
    "metrics": ("answer_accuracy", "semantic_similarity", "bert_score", "f1"),
    "error_rows": "excluded",
    "judge_calibration": "calibrations.json",
    "judge_minimum_kappa": 0.5,
    "thought_markers": "none",
    "bootstrap_resamples": 500,
    "confidence": 0.9,
    "seed": 1,
    "llm": "other",
    "embedding": "other",
    "judge_base_url": "http://judge.example/v1",
    "embedding_base_url": "http://embedding.example/v1",
    "judge_timeout_seconds": 5.0,
    "judge_max_retries": 1,
    "judge_max_tokens": 2048,
    "judge_budget_dollars": 3.0,
    "cost_per_million_input_tokens": 2.0,
    "cost_per_million_output_tokens": 2.0,
    "bert_score_model": "other",
    "bert_score_layer": 3,
}


def other_than(section: type[Section], name: str) -> Any:
    """Another value than the default of a key that has no special one above."""
    default = section.model_fields[name].default
    return not default if isinstance(default, bool) else default + 1 if default is not None else 1


def figures_by_themselves() -> set[str]:
    declared = changes_of(EvaluatorConfig).items()
    return {name for name, changes in declared if changes.effect == "figures" and changes.within is None}


def test_each_setting_that_changes_figures_makes_another_evaluation() -> None:
    prices = {"cost_per_million_input_tokens": 1.0, "cost_per_million_output_tokens": 1.0}
    before = {**JUDGED, **prices}
    assert figures_by_themselves() >= OTHER_FIGURES.keys()
    for name in figures_by_themselves():
        value = OTHER_FIGURES[name] if name in OTHER_FIGURES else other_than(EvaluatorConfig, name)
        changed = settings_of(EvaluatorConfig(**{**before, name: value}))
        assert changed != settings_of(EvaluatorConfig(**before)), name
        assert EvaluationSettings.model_validate_json(changed.model_dump_json()) == changed


def test_settings_of_models_that_no_metric_asks_for_change_no_figure() -> None:
    plain = settings_of(EvaluatorConfig())
    models = (
        "llm",
        "judge_base_url",
        "embedding",
        "judge_max_tokens",
        "bert_score_model",
        "judge_concurrency",
    )
    values = {**OTHER_FIGURES, "judge_concurrency": 2}
    assert settings_of(EvaluatorConfig(**{name: values[name] for name in models})) == plain
    assert settings_of(EvaluatorConfig(**JUDGED, judge_concurrency=2)) == settings_of(
        EvaluatorConfig(**JUDGED)
    )


def test_settings_of_an_earlier_summary_still_load_and_are_equal() -> None:
    written = {
        "metrics": ["f1"], "error_rows": "wrong", "bootstrap_resamples": 10_000, "confidence": 0.95,
        "seed": 42, "llm": None, "embedding": None,
    }  # fmt: skip
    assert EvaluationSettings.model_validate(written) == settings_of(EvaluatorConfig(metrics=("f1",)))


@pytest.mark.parametrize("misspelt", ["temprature", "max_tokens", "topk"])
def test_a_misspelt_setting_of_an_answer_made_by_hand_is_refused(misspelt: str) -> None:
    with pytest.raises(ValidationError, match=misspelt):
        GenerationSettings.model_validate({misspelt: 1})


def test_settings_that_came_later_stand_in_key_and_file_only_where_they_are_not_at_their_default() -> None:
    usual, later = GenerationSettings(), GenerationSettings(others={"lucky_answer": 8})
    assert "others" not in usual.model_dump_json() and "others" not in usual.values()
    assert later.values() == {**usual.values(), "lucky_answer": 8}
    assert GenerationSettings.model_validate_json(later.model_dump_json()) == later
