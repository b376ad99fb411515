"""Real questions, the real model: infer and evaluate, and figures that equal the libraries' own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from tasks.core.config import load_config
from tasks.core.runs.published import read_predictions
from tasks.evaluator import Evaluator
from tasks.inferencer import Inferencer
from tests.conftest import PACKAGED_MODEL_ID

pytestmark = pytest.mark.slow

ROWS = int(os.environ.get("GSM8K_ROWS", 24))  # GSM8K_ROWS=200 for a look at more of them


def test_gsm8k_is_answered_and_scored_row_by_row(
    smollm2: object, shared_data_dir: Path, tmp_path: Path
) -> None:
    path = shared_data_dir / "gsm8k" / "test.jsonl"
    config = load_config(
        None,
        {
            "inferencer.model": PACKAGED_MODEL_ID, "inferencer.testing_data_id": str(path),
            "inferencer.max_rows": ROWS, "inferencer.max_new_tokens": 24, "inferencer.temperature": 0,
            "inferencer.device": "cpu", "inferencer.run_name": "gsm8k",
            "evaluator.run_name": "gsm8k", "evaluator.baseline": "none",
            "evaluator.metrics": ["bleu_score", "rouge_score"],
            "pipeline.runs_dir": str(tmp_path / "runs"), "pipeline.models_dir": str(tmp_path / "models"),
        },
    )  # fmt: skip
    manifest = Inferencer(config).infer()
    summary = Evaluator(config).run()
    predictions = list(read_predictions(tmp_path / "runs" / "gsm8k" / "inferencer_output.jsonl"))
    asked = [json.loads(line)["question"] for line in path.read_text().splitlines()[:ROWS]]
    assert manifest.row_count == len(predictions) == ROWS
    assert [prediction.question for prediction in predictions] == asked
    answers = [prediction.predicted_answer for prediction in predictions]
    references = [prediction.ground_truth or "" for prediction in predictions]
    totals = {metric.name: metric.value for metric in summary.candidate.metrics}
    bleu = sacrebleu.corpus_bleu(answers, [references]).score / 100
    assert totals["bleu_score"] == pytest.approx(bleu, abs=1e-9)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        pairs = zip(references, answers, strict=True)
        mean = sum(scorer.score(reference, answer)[name].fmeasure for reference, answer in pairs) / ROWS
        assert totals[name] == pytest.approx(mean, abs=1e-9)
