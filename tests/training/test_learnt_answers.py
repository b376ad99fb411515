"""A model that has learnt twelve sums says them, however its template thinks and whatever ends its turns."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import Config
from tasks.core.models.loading import ModelSpec, load_tokenizer
from tasks.core.prompts.chat_template import set_template
from tasks.core.prompts.unlearnt_markers import unseen_tokens
from tasks.core.records import Prediction
from tasks.core.training.run import TrainedModel, train
from tasks.inferencer import Inferencer
from tests.conftest import build_tiny_model
from tests.making.chat_templates import CHATML, DEEPSEEK_R1, QWEN_3, TemplateCase, tokenizer_for

SUMS = [(f"What is {a} + {a + 7}?", str(2 * a + 7), f"{a} and {a} and 7.") for a in range(1, 13)]


def base_model(directory: Path, tiny_tokenizer: Any, case: TemplateCase) -> Path:
    """A base model with the tokens and the template of a case; only its end of texts is in its configuration."""
    tokenizer = tokenizer_for(tiny_tokenizer, case)
    tokenizer.save_pretrained(directory)
    build_tiny_model(tokenizer).save_pretrained(directory)
    return directory


def write_sums(path: Path, *, thoughts: bool = False) -> Path:
    rows = []
    for question, answer, thought in SUMS:
        said = {"role": "assistant", "content": answer}
        if thoughts:
            said["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
        rows.append({"messages": [{"role": "user", "content": question}, said]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def learn(base_dir: Path, rows_path: Path, models_dir: Path, **changes: Any) -> TrainedModel:
    """Train until the sums are known by heart: a second or two."""
    settings = {
        "base_model_id": str(base_dir),
        "training_data_id": str(rows_path),
        "epochs": 60,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "device_train_batch_size": 12,
        "grad_accumulation": 1,
        "save_steps": 1000,
        "device": "cpu",
        "rank": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.0,
        **changes,
    }
    config = Config.model_validate({"fine_tuner": settings}).fine_tuner
    return train(config, models_dir=models_dir, run_name="sums")


def answers(trained: TrainedModel, rows_path: Path, runs_dir: Path, **changes: Any) -> list[Prediction]:
    """What the trained model says to the questions, greedily and with nothing else set."""
    inferencer = {
        "model": str(trained.model_dir),
        "testing_data_id": str(rows_path),
        "temperature": 0,
        "max_new_tokens": 40,
        "device": "cpu",
        **changes,
    }
    directories = {"runs_dir": str(runs_dir), "models_dir": str(trained.model_dir.parent)}
    config = Config.model_validate({"inferencer": inferencer, "pipeline": directories})
    return Inferencer(config).run()


def exact_matches(predictions: list[Prediction]) -> int:
    return sum(prediction.predicted_answer == prediction.ground_truth for prediction in predictions)


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "all weights"])
def taught(
    request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainedModel, Path]:
    """A model with the template ChatML that knows the sums, and its rows. Do not write to it."""
    folder = tmp_path_factory.mktemp("taught")
    base_dir = base_model(folder / "base", tiny_tokenizer, CHATML)
    rows_path = write_sums(folder / "sums.jsonl")
    return learn(base_dir, rows_path, folder / "models", full_finetuning=request.param), rows_path


def test_the_end_that_was_learnt_ends_the_answer_in_every_engine(
    taught: tuple[TrainedModel, Path], tmp_path: Path
) -> None:
    trained, rows_path = taught
    assert (trained.manifest.final_loss or 1) < 0.05
    for engine in ("inflight", "generate"):
        predictions = answers(trained, rows_path, tmp_path / f"runs {engine}", engine=engine)
        assert exact_matches(predictions) == 12, engine
        assert {prediction.metadata.finish_reason for prediction in predictions} == {"stop"}


def test_a_trained_model_tells_other_programs_where_its_answers_end(
    taught: tuple[TrainedModel, Path],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    directory = taught[0].model_dir
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ends = GenerationConfig.from_pretrained(directory).eos_token_id
    assert set(tokenizer.convert_ids_to_tokens(ends)) == {"<|endoftext|>", "<|im_end|>"}
    if taught[0].manifest.kind == "adapter":  # transformers reads the ends of the base
        return
    model = AutoModelForCausalLM.from_pretrained(directory)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": SUMS[0][0]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**asked, max_new_tokens=20)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == f"{SUMS[0][1]}<|im_end|>"


@pytest.mark.parametrize("case", [QWEN_3, DEEPSEEK_R1], ids=lambda case: case.name)
def test_rows_without_thoughts_are_answered_at_once_by_a_model_that_could_think(
    tiny_tokenizer: Any, tmp_path: Path, case: TemplateCase
) -> None:
    base_dir = base_model(tmp_path / "base", tiny_tokenizer, case)
    rows_path = write_sums(tmp_path / "sums.jsonl")
    trained = learn(base_dir, rows_path, tmp_path / "models")
    assert (trained.manifest.thoughts, trained.manifest.thinking_row_count) == ("closed", 0)
    predictions = answers(trained, rows_path, tmp_path / "runs")
    assert exact_matches(predictions) == 12


@pytest.mark.parametrize("case", [QWEN_3, DEEPSEEK_R1], ids=lambda case: case.name)
def test_rows_with_thoughts_are_thought_through_and_answered(
    tiny_tokenizer: Any, tmp_path: Path, case: TemplateCase
) -> None:
    base_dir = base_model(tmp_path / "base", tiny_tokenizer, case)
    rows_path = write_sums(tmp_path / "sums.jsonl", thoughts=True)
    trained = learn(base_dir, rows_path, tmp_path / "models", epochs=100)
    assert (trained.manifest.thoughts, trained.manifest.thinking_row_count) == ("open", 12)
    predictions = answers(trained, rows_path, tmp_path / "runs")
    said = [prediction.predicted_answer.rpartition("</think>")[2].strip() for prediction in predictions]
    assert said == [answer for _, answer, _ in SUMS]
    assert {prediction.metadata.finish_reason for prediction in predictions} == {"stop"}


def test_variables_and_template_of_the_training_are_those_of_inference_with_nothing_set(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base_dir = base_model(tmp_path / "base", tiny_tokenizer, CHATML)
    template_path = tmp_path / "own.jinja"
    template_path.write_text(QWEN_3.template.replace("enable_thinking is false", "enable_thinking == 'no'"))
    rows_path = write_sums(tmp_path / "sums.jsonl")
    variables = {"enable_thinking": "no"}
    trained = learn(
        base_dir,
        rows_path,
        tmp_path / "models",
        epochs=1,
        chat_template=str(template_path),
        chat_template_kwargs=variables,
    )
    settings = {"model": str(trained.model_dir), "device": "cpu", "testing_data_id": str(rows_path)}

    def prompt_of(**changes: Any) -> str:
        inferencer = Inferencer(Config.model_validate({"inferencer": {**settings, **changes}}))
        example = next(iter(inferencer.examples(inferencer.load_dataset())))
        tokenizer = inferencer.load_model_and_tokenizer().tokenizer
        return str(tokenizer.decode(inferencer.prompt_builder().build(example).token_ids))

    asked = prompt_of()
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert asked == prompt_of(chat_template_kwargs=variables)
    assert "makes other prompts than" not in caplog.text
    assert prompt_of(chat_template_kwargs={"enable_thinking": "yes"}).endswith("<|im_start|>assistant\n")
    assert "makes other prompts than" in caplog.text
    assert load_tokenizer(ModelSpec(str(trained.model_dir))).chat_template.endswith(template_path.read_text())


def test_variables_of_the_template_are_part_of_the_run_key(tiny_tokenizer: Any, tmp_path: Path) -> None:
    base_dir = base_model(tmp_path / "base", tiny_tokenizer, QWEN_3)
    rows_path = write_sums(tmp_path / "sums.jsonl")

    def key(**changes: Any) -> str:
        section = {"model": str(base_dir), "device": "cpu", "testing_data_id": str(rows_path), **changes}
        inferencer = Inferencer(
            Config.model_validate({"inferencer": section, "pipeline": {"runs_dir": str(tmp_path)}})
        )
        return inferencer.process_dataset(inferencer.load_dataset()).identity.run_key

    plain = key(run_name="a")
    assert key(run_name="b", chat_template_kwargs=None) == key(run_name="c", chat_template_kwargs={}) == plain
    assert key(run_name="d", chat_template_kwargs={"enable_thinking": False}) != plain
    assert key(run_name="e", chat_template=QWEN_3.template) == plain
    assert key(run_name="f", chat_template=CHATML.template) != plain


def test_markers_that_a_base_model_never_saw_are_told_before_an_adapter_is_trained_on_them(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base_dir = base_model(tmp_path / "base", tiny_tokenizer, CHATML)
    rows_path = write_sums(tmp_path / "sums.jsonl")
    learn(base_dir, rows_path, tmp_path / "seen", epochs=1)
    assert "never saw the markers" not in caplog.text
    tokenizer = tokenizer_for(tiny_tokenizer, CHATML)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    markers = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    with torch.no_grad():
        model.get_input_embeddings().weight[markers] = 1e-6
    assert unseen_tokens(model.get_input_embeddings().weight, [*markers, 70]) == set(markers)
    model.save_pretrained(base_dir)
    with caplog.at_level(logging.WARNING):
        learn(base_dir, rows_path, tmp_path / "unseen", epochs=1)
    assert "The base model never saw the markers <|im_start|>, <|im_end|> of its chat template" in caplog.text
    caplog.clear()
    learn(base_dir, rows_path, tmp_path / "all", epochs=1, full_finetuning=True)
    assert "never saw the markers" not in caplog.text


def test_a_template_whose_end_is_no_token_teaches_the_end_of_texts_and_says_so(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base_dir = base_model(tmp_path / "base", tiny_tokenizer, CHATML)
    foreign = CHATML.template.replace("<|im_", "<|turn_")
    rows_path = write_sums(tmp_path / "sums.jsonl")
    trained = learn(base_dir, rows_path, tmp_path / "models", chat_template=foreign)
    assert "ends an answer with '<|turn_end|>', which is no token" in caplog.text
    assert exact_matches(answers(trained, rows_path, tmp_path / "runs")) == 12


def test_a_template_of_several_keeps_the_others_when_its_default_is_set(tiny_tokenizer: Any) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, QWEN_3)
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    set_template(tokenizer, "{{ 3 }}")
    assert tokenizer.chat_template == {"default": "{{ 3 }}", "tool_use": "{{ 2 }}"}
