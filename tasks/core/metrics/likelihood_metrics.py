"""Perplexity of the references, from the likelihoods that the inference stage wrote; no model is called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.core.errors import EvaluationError
from tasks.core.metrics.metric import (
    BatchScores,
    Corpus,
    FloatArray,
    Metric,
    ScoredRun,
    ScoreRows,
    single,
)
from tasks.core.records import Prediction
from tasks.core.runs.ledger_lines import DamagedLineError, score_in

NO_LIKELIHOODS = "the run did not score its references"
NO_LIKELIHOOD = "its reference was not scored"


def _perplexity(sums: FloatArray) -> FloatArray:
    losses, tokens = sums[..., 0], sums[..., 1]
    means = np.divide(losses, tokens, out=np.full_like(losses, np.nan), where=tokens > 0)
    figure: FloatArray = np.exp(np.minimum(means, 700.0))  # beyond, a float cannot hold it
    return figure


CORPUS_PERPLEXITY = Corpus("perplexity per token of all references", 2, _perplexity)
"""Statistics of a row: its reference's negative log-likelihood (natural logarithm), and its tokens."""

PERPLEXITY = Metric(
    "perplexity",
    "How surprised the model is by the references, per token; compare only models with the same tokenizer.",
    "Jelinek et al. 1977",
    direction="lower",
    minimum=1.0,
    maximum=float("inf"),
    corpus=CORPUS_PERPLEXITY,
    unscored_when=f"{NO_LIKELIHOODS} (inferencer.score_references), or the row has none that fits or ended in an "
    "error",
    errors_are_wrong=False,
    about_the_answer=False,
)


@dataclass(frozen=True, slots=True)
class ReferenceLikelihoods:
    """Scores rows by id with (negative log-likelihood, tokens) or why there is none; None without a file."""

    by_id: dict[str, tuple[float, int] | str] | None

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        """Look the rows up; `reference_likelihoods.jsonl` has no line for a row without a reference."""
        statistics = np.zeros((len(rows), 2))
        reasons: list[str | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            found = None if self.by_id is None else self.by_id.get(row.id)
            if found is None:
                reasons[i] = NO_LIKELIHOODS if self.by_id is None else NO_LIKELIHOOD
            elif isinstance(found, str):
                reasons[i] = f"{NO_LIKELIHOOD}: {found}"
            else:
                statistics[i] = found
        return BatchScores({PERPLEXITY.name: _perplexity(statistics)}, reasons, {PERPLEXITY.name: statistics})


def read_likelihoods(
    path: Path | None, sha256: str | None = None, tokens: int | None = None
) -> ReferenceLikelihoods:
    """Read a run's `reference_likelihoods.jsonl`, of which the manifest tells the digest or at least the tokens.

    Raises EvaluationError when it is not the file that the manifest tells of.
    """
    if path is None or (not path.exists() and sha256 is None):
        return ReferenceLikelihoods(None)
    by_id: dict[str, tuple[float, int] | str] = {}
    digest, count = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                try:
                    row = score_in(line)
                except DamagedLineError as exc:
                    raise _not_whole(f"{path}: line {number} is damaged ({exc})") from exc
                by_id[row["id"]] = row.get("error") or (row["negative_log_likelihood"], row["tokens"])
                count += row.get("tokens", 0)
    except OSError as exc:
        raise _not_whole(f"{path} cannot be read: {exc.strerror or exc}") from exc
    if sha256 not in (None, digest.hexdigest()):
        raise _not_whole(f"{path} was changed after its run: its digest is not the manifest's")
    if sha256 is None and tokens not in (None, count):
        raise _not_whole(f"{path} has {count} tokens of references, and the manifest says {tokens}")
    return ReferenceLikelihoods(by_id)


def _not_whole(what: str) -> EvaluationError:
    return EvaluationError(
        what,
        "run `tuneproof infer` again with the same settings: it scores the references anew and keeps the answers",
    )


def _bind(run: ScoredRun) -> ScoreRows:
    return read_likelihoods(run.references_path, run.references_sha256, run.reference_tokens)


LIKELIHOOD_FAMILIES = (
    single(
        PERPLEXITY,
        ReferenceLikelihoods(None),
        in_process=True,
        bind=_bind,
        needs="the run's `reference_likelihoods.jsonl` (`inferencer.score_references`)",
        note="calls no model when scoring. It counts tokens of the model's own tokenizer: compare it only between "
        "models that share one. Its figure is that of all references together, not the mean of the rows.",
    ),
)
