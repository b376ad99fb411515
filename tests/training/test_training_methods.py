"""A training method is one file: what it reads, how rows make a batch, and the loss; all else is the same for all."""

from __future__ import annotations

import importlib
import json
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tasks.core.config import FineTunerConfig, load_config
from tasks.core.errors import ConfigError
from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer
from tasks.core.training.methods import catalogue
from tasks.core.training.run import TrainedModel, train

# What somebody writes who adds a method: every token of a row is learnt, its first one aside.
LANGUAGE_MODELLING = """
from dataclasses import replace

import torch
from torch.nn import functional

from tasks.core.training.methods.base import TrainingMethod
from tasks.core.training.methods.rows import TokenizedRows
from tasks.core.training.methods.sft import read_training_data


class Method(TrainingMethod):
    name = "language-modelling"

    def read(self, config, tokenizer):
        data = read_training_data(config, tokenizer)
        every = [
            part and replace(part, rows=TokenizedRows((ids, ids) for ids, _ in part.rows))
            for part in (data.train, data.validation)
        ]
        return replace(data, train=every[0], validation=every[1])

    def collator(self, rows, sequences, pad_token_id):
        def collate(indices):
            ids = [torch.tensor(rows[index][0].tolist()) for index in indices]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
            return {
                "ids": padded,
                "token_count": sum(len(row) for row in ids),
                "item_count": sum(len(row) - 1 for row in ids),
            }

        return collate

    def loss(self, model):
        def of_batch(model, batch):
            logits = model(input_ids=batch["ids"].clamp_min(0)).logits[:, :-1].float()
            return functional.cross_entropy(
                logits.transpose(1, 2), batch["ids"][:, 1:], ignore_index=-1, reduction="sum"
            )

        return of_batch
"""

# Two answers to a question, of which the first is better (direct preference optimisation, arXiv 2305.18290, eq. 7).
PAIRS = """
import hashlib
import json
from pathlib import Path

import torch
from torch.nn import functional

from tasks.core.training.methods.base import TrainingMethod
from tasks.core.training.methods.batches import Collator
from tasks.core.training.methods.rows import RowSet, TokenizedRows, TrainedTemplate, TrainingData


class Method(TrainingMethod):
    name = "pairs"

    def read(self, config, tokenizer):
        def part(path):
            text = Path(path).read_text()
            rows = [json.loads(line) for line in text.splitlines()]
            asked = [tokenizer(row["question"]).input_ids for row in rows]
            answers = [[tokenizer(row[name]).input_ids for name in ("better", "worse")] for row in rows]
            tokens = TokenizedRows(
                (prompt + answer, [-100] * len(prompt) + answer)
                for prompt, both in zip(asked, answers)
                for answer in both
            )
            digest = hashlib.sha256(text.encode()).hexdigest()
            return RowSet(str(path), tokens, digest, digest, skipped_count=0, truncated_count=0)

        template = TrainedTemplate(None, hashlib.sha256(b"none").hexdigest(), None, None)
        parts = part(config.training_data_id), part(config.validation_data_id)
        return TrainingData(*parts, template.sha256, template)

    def sequences(self, rows, config):
        return [(at, at + 1) for at in range(0, len(rows), 2)]

    def collator(self, rows, sequences, pad_token_id):
        single = Collator(rows, None, pad_token_id)

        def collate(indices):
            both = [row for index in indices for row in sequences[index]]
            batch = single(both)
            lines = batch["positions"] // batch["input_ids"].shape[1]
            return {**batch, "lines": lines, "item_count": len(indices)}

        return collate

    def loss(self, model):
        def scores(model, batch):
            logits = model(input_ids=batch["input_ids"]).logits.float().flatten(0, 1)[batch["positions"]]
            each = -functional.cross_entropy(logits, batch["targets"], reduction="none")
            return torch.zeros(len(batch["input_ids"])).index_add(0, batch["lines"], each)

        def of_batch(model, batch):
            with torch.no_grad(), model.disable_adapter():
                base = scores(model, batch)
            gain = (scores(model, batch) - base).view(-1, 2)
            return -functional.logsigmoid(0.1 * (gain[:, 0] - gain[:, 1])).sum()

        return of_batch
"""


@pytest.fixture(autouse=True)
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both methods stand in the catalogue, each from a file of its own."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {"method_of_language": LANGUAGE_MODELLING, "method_of_pairs": PAIRS}.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    added = [importlib.import_module(name).Method() for name in ("method_of_language", "method_of_pairs")]
    monkeypatch.setattr(catalogue, "METHODS", (*catalogue.METHODS, *added))
    yield
    for method in added:
        monkeypatch.delitem(importlib.sys.modules, type(method).__module__)  # type: ignore[attr-defined]


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """Three epochs of sixteen sums, with a wrong answer to each."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "question": f"What is {i} + {i}?" + " Say only the sum." * (i % 3),
            "answer": f"{2 * i}",
            "better": f"{2 * i} apples",
            "worse": f"no more than {3 * i + 1} books",
        }
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "base_model_id": str(tiny_model_dir),
        "training_data_id": str(path),
        "validation_data_id": str(path),
        "device_train_batch_size": 4,
        "grad_accumulation": 1,
        "warmup_steps": 0,
        "learning_rate": 5e-3,
        "lora_dropout": 0.0,
        "device": "cpu",
    }


def run(settings: dict[str, Any], tmp_path: Path, name: str, **changes: Any) -> TrainedModel:
    return train(FineTunerConfig(**{**settings, **changes}), models_dir=tmp_path / "models", run_name=name)


def validation_losses(trained: TrainedModel) -> list[float]:
    return [point.validation_loss for point in trained.manifest.losses if point.validation_loss is not None]


def test_a_method_of_ones_own_learns_what_its_loss_says(settings: dict[str, Any], tmp_path: Path) -> None:
    trained = run(settings, tmp_path, "language", training_method="language-modelling")

    losses = validation_losses(trained)
    assert losses[-1] < 0.8 * losses[0]
    config = FineTunerConfig(**settings, training_method="language-modelling")
    loaded = load_model_and_tokenizer(ModelSpec(str(trained.model_dir), device="cpu"))
    rows = catalogue.method_of(config).read(config, loaded.tokenizer).train.rows
    ids = [torch.tensor(rows[index][0].tolist()) for index in range(len(rows))]
    with torch.no_grad():
        summed = sum(
            float(functional.cross_entropy(loaded.model(row[None]).logits[0, :-1], row[1:], reduction="sum"))
            for row in ids
        )
    assert losses[-1] == pytest.approx(summed / sum(len(row) - 1 for row in ids), rel=1e-3)


def test_a_method_of_pairs_counts_pairs_however_a_step_is_cut(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(settings, tmp_path, "whole", training_method="pairs")
    pieces = run(
        settings,
        tmp_path,
        "pieces",
        training_method="pairs",
        device_train_batch_size=1,
        grad_accumulation=4,
        device_validation_batch_size=3,
    )

    assert whole.manifest.steps == 12  # 16 pairs, four in an update, three times
    losses = validation_losses(whole)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    assert validation_losses(pieces) == pytest.approx(losses, rel=1e-3)


def test_the_method_is_part_of_what_a_training_is(settings: dict[str, Any], tmp_path: Path) -> None:
    other = run(settings, tmp_path, "other", training_method="language-modelling")
    usual = run(settings, tmp_path, "usual")

    identities = [
        json.loads((trained.model_dir / "identity.json").read_text())["settings"]
        for trained in (other, usual)
    ]
    assert identities[0]["training_method"] == "language-modelling"
    assert "training_method" not in identities[1]
    assert other.manifest.weights_sha256 != usual.manifest.weights_sha256


def test_an_unknown_method_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r'training_method.*you may mean "pairs"'):
        load_config(None, {"fine_tuner.training_method": "pair"}, {})
