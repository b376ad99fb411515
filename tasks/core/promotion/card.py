"""The scores of a promoted model in its README.md, for readers and for the Hub's tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.files import write_atomically
from tasks.core.models.locating import is_hub_name
from tasks.core.models.trained.registry import read_manifest
from tasks.core.training.card import model_card, number

if TYPE_CHECKING:
    from tasks.core.promotion.promotion import Evidence, PromotedScore, Promotion


_SCORES = re.compile(r"\n*<!-- scores -->.*<!-- end of scores -->\n*", re.DOTALL)


def write_scored_card(model_dir: Path, promotion: Promotion) -> Path:
    """Put the scores of a promotion's evaluation into a model's README.md: for readers and for the Hub's tables.

    The rest of the card stays as it is. Raises StorageError.
    """
    path = model_dir / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else model_card(read_manifest(model_dir))
    if promotion.evidence is not None:
        text = scored_card(text, promotion, promotion.evidence)
    write_atomically(path, text)
    return path


def scored_card(text: str, promotion: Promotion, evidence: Evidence) -> str:
    """A card with the evaluation in its front matter (the Hub's model-index) and as a section of its own.

    Format: https://huggingface.co/docs/hub/model-cards#evaluation-results
    """
    from huggingface_hub import EvalResult, ModelCard

    dataset = evidence.dataset_id or "unknown"
    card = ModelCard(_SCORES.sub("\n", text), ignore_metadata_errors=True)
    data: Any = card.data
    data.model_name = promotion.run_name
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset if is_hub_name(dataset) else Path(dataset).stem,
            dataset_name=Path(dataset).stem,
            dataset_split=evidence.dataset_split,
            metric_type=score.metric,
            metric_name=score.metric,
            metric_value=score.value,
        )
        for score in evidence.scores
        if score.value is not None
    ]
    verdict = evidence.verdict
    section = [
        *("<!-- scores -->", "## Evaluation", ""),
        f"{evidence.rows} rows of `{Path(dataset).name}`; promoted {promotion.promoted_at}.",
        "",
        f"| metric | this model | {evidence.opponent_run_name or 'compared with'} |",
        "|---|---|---|",
        *(
            f"| {score.metric} | {_interval(score)} | {number(score.opponent_value)} |"
            for score in evidence.scores
        ),
        "",
        *(f"- {reason}" for reason in (verdict.reasons if verdict else ())),
        "<!-- end of scores -->",
    ]
    return f"{str(card).rstrip()}\n\n" + "\n".join(section) + "\n"


def _interval(score: PromotedScore) -> str:
    interval = score.interval
    return number(score.value) + (f" [{interval.low:.4f}, {interval.high:.4f}]" if interval else "")
