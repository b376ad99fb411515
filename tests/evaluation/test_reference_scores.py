"""Scores of the references: kept as they come, whole or made again, and never a number that is none."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import EvaluatorConfig, GateConfig, load_config
from tasks.core.errors import EvaluationError, NoAnswerError
from tasks.core.evaluation.evaluate import score_run
from tasks.core.evaluation.gate.gate import Gating
from tasks.core.generation import reference_scorer
from tasks.core.generation.engines.inflight import InflightEngine
from tasks.core.metrics.likelihood_metrics import read_likelihoods
from tasks.core.records import RunManifest
from tasks.core.runs.manifest import REFERENCE_SCORER
from tasks.core.runs.published import read_predictions, refuse_without_answers
from tasks.core.runs.run_dir import RunDir, seal_path_of
from tasks.inferencer import Inferencer
from tests.making.evaluation_runs import evaluate_run

QUESTIONS = [f"How many legs have {n} dogs?" for n in range(8)] + ["Sort these numbers: 3, 21, 18."]
ANSWERS = [*map(str, range(8)), "pencils"]


@pytest.fixture
def overrides(tmp_path: Path, tiny_model_dir: Path, own_cache: Path) -> dict[str, Any]:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": question, "answer": answer} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "inferencer.model": str(tiny_model_dir), "inferencer.testing_data_id": str(path),
        "inferencer.max_new_tokens": 4, "inferencer.temperature": 0, "inferencer.device": "cpu",
        "inferencer.run_name": "run", "pipeline.runs_dir": str(tmp_path / "runs"),
        "pipeline.models_dir": str(tmp_path / "models"),
    }  # fmt: skip


def infer(overrides: dict[str, Any], **more: Any) -> RunManifest:
    changed = {f"inferencer.{key}": value for key, value in more.items()}
    return Inferencer(load_config(None, {**overrides, **changed})).infer()


@pytest.fixture(scope="module")
def answered_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that an earlier test has answered and scored, by their settings."""
    return tmp_path_factory.mktemp("answered")


@pytest.fixture
def answered(answered_runs: Path, overrides: dict[str, Any]) -> Callable[..., RunManifest]:
    """Answer and score; a run with settings that an earlier test has asked for comes as a copy of its files."""

    def answer(**more: Any) -> RunManifest:
        kept, runs_dir = answered_runs / repr(sorted(more.items())), Path(overrides["pipeline.runs_dir"])
        if kept.exists():
            shutil.copytree(kept, runs_dir)
            return run_of(overrides).read_manifest()
        manifest = infer(overrides, **more)
        shutil.copytree(runs_dir, kept)
        return manifest

    return answer


def run_of(overrides: dict[str, Any]) -> RunDir:
    return RunDir(Path(overrides["pipeline.runs_dir"]) / "run")


def count_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch whose references are scored from now on."""
    plain, scored = reference_scorer.ReferenceScorer._losses, list[int]()

    def counting(self: Any, batch: Any) -> Any:
        scored.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(reference_scorer.ReferenceScorer, "_losses", counting)
    return scored


def forbid_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("an answer was generated again")

    monkeypatch.setattr(InflightEngine, "generate", refused)


def break_weight(directory: Path, name: str, place: Any, value: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights[name][place] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_references_are_scored_later_without_generating_again(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = infer(overrides, score_references=False)
    forbid_generation(monkeypatch)
    later = infer(overrides)
    assert first.reference_perplexity is None
    assert later.reference_perplexity is not None and later.predictions_sha256 == first.predictions_sha256
    assert infer(overrides) == later  # and now it is complete


@pytest.mark.parametrize("damage", ["deleted", "torn", "last line lost", "changed"])
def test_a_file_of_scores_that_is_not_whole_is_made_again_without_generating(
    damage: str,
    overrides: dict[str, Any],
    answered: Callable[..., RunManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = answered()
    path = run_of(overrides).references_path
    content = path.read_bytes()
    damaged = {
        "torn": content[:-9],
        "last line lost": content[: content[:-1].rfind(b"\n") + 1],
        "changed": content.replace(b'"tokens":', b'"tokens":1', 1),
    }
    path.write_bytes(damaged[damage]) if damage in damaged else path.unlink()
    forbid_generation(monkeypatch)
    after = infer(overrides)
    assert path.read_bytes() == content
    assert after.reference_perplexity == before.reference_perplexity


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("damage", ["two lines", "torn", "no score", "no seal"])
def test_scores_that_are_not_whole_are_made_again_before_there_is_a_manifest(
    damage: str,
    shards: int,
    overrides: dict[str, Any],
    answered: Callable[..., RunManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a kill between scoring and publishing, and then a fault of the disk, leave them."""
    before = answered(num_shards=shards, shard_runner="threads")
    run = run_of(overrides)
    for path in (run.manifest_path, *([run.references_path] if shards > 1 else [])):
        path.unlink()
    paths = [run.references_path, *run.shards_path.glob("*/reference_likelihoods.jsonl")]
    path = max((path for path in paths if path.exists()), key=lambda path: path.stat().st_size)
    lines = path.read_bytes().splitlines(keepends=True)
    contents = {
        "two lines": b"".join(lines[:2]),
        "torn": b"".join(lines)[:-9],
        "no score": b"".join([b'{"id":"%b"}\n' % json.loads(lines[0])["id"].encode(), *lines[1:]]),
        "no seal": b"".join(lines),
    }
    path.write_bytes(contents[damage])
    if damage == "no seal":
        seal_path_of(path).unlink()
    forbid_generation(monkeypatch)
    after = infer(overrides, num_shards=shards, shard_runner="threads")
    assert after.reference_tokens == before.reference_tokens
    assert after.reference_perplexity == pytest.approx(before.reference_perplexity, rel=1e-6)


def scored_by_the_first_version(run: RunDir) -> None:
    """Seal, manifest and figures as the version left them that wrote no number of its way."""
    path = run.references_path
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    changed = [{**line, "negative_log_likelihood": line["negative_log_likelihood"] * 0.99} for line in lines]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in changed))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    seal = json.loads(seal_path_of(path).read_text())
    seal_path_of(path).write_text(json.dumps({**seal, "sha256": digest, "scorer": 1}))
    if run.manifest_path.exists():
        left = {**json.loads(run.manifest_path.read_text()), "references_sha256": digest}
        for key in ("reference_scorer", "content_sha256"):
            left.pop(key)
        run.manifest_path.write_text(json.dumps(left))


@pytest.mark.parametrize(
    ("dtype", "published", "kept"),
    [("float32", True, True), ("bfloat16", True, False), ("bfloat16", False, False)],
)
def test_scores_in_16_bits_of_a_version_that_rounds_otherwise_are_made_again(
    dtype: str,
    published: bool,
    kept: bool,
    overrides: dict[str, Any],
    answered: Callable[..., RunManifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = answered(dtype=dtype)
    run = run_of(overrides)
    if not published:
        run.manifest_path.unlink()
    scored_by_the_first_version(run)
    older = run.references_path.read_bytes()
    forbid_generation(monkeypatch)
    after = infer(overrides, dtype=dtype)
    assert (run.references_path.read_bytes() == older) == kept
    assert after.predictions_sha256 == before.predictions_sha256
    assert kept or after.reference_perplexity == before.reference_perplexity
    assert infer(overrides, dtype=dtype) == after


@pytest.mark.parametrize(
    ("dtype", "metric", "outcome"),
    [
        ("bfloat16", "perplexity", "undecided"),
        ("bfloat16", "contains", "skipped"),
        ("float32", "perplexity", None),
    ],
)
def test_perplexities_that_were_rounded_otherwise_promote_nothing(
    dtype: str,
    metric: str,
    outcome: str | None,
    overrides: dict[str, Any],
    answered: Callable[..., RunManifest],
) -> None:
    answered(dtype=dtype)
    candidate = run_of(overrides).path
    base = RunDir(candidate.with_name("base"))
    shutil.copytree(candidate, base.path)
    scored_by_the_first_version(base)
    settings = EvaluatorConfig(metrics=(metric,), bootstrap_resamples=100)
    verdict = score_run(candidate, base.path, settings, gating=Gating(GateConfig())).verdict
    assert verdict is not None
    found = [check for check in verdict.checks if check.name == "References scored alike"]
    assert [check.outcome for check in found] == ([] if outcome is None else [outcome])
    assert all("were scored by a version that rounds otherwise" in check.detail for check in found)


def test_a_damaged_line_of_interrupted_scoring_is_scored_again_and_no_other(
    overrides: dict[str, Any], answered: Callable[..., RunManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answered()
    run = run_of(overrides)
    partial_path = run.references_path.with_suffix(f".partial-{REFERENCE_SCORER}.jsonl")
    lines = run.references_path.read_bytes().splitlines(keepends=True)
    partial_path.write_bytes(b"".join([lines[0], lines[1].replace(b'"tokens":', b'"tokens":"'), *lines[2:]]))
    for path in (run.references_path, run.manifest_path):
        path.unlink()
    asked = count_scored(monkeypatch)
    assert infer(overrides).reference_perplexity == pytest.approx(whole.reference_perplexity, rel=1e-6)
    assert sum(asked) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "deleted"])
def test_an_evaluation_refuses_scores_that_are_not_those_of_the_manifest(
    damage: str, overrides: dict[str, Any], answered: Callable[..., RunManifest]
) -> None:
    answered()
    run = run_of(overrides)
    settings = EvaluatorConfig(metrics=("perplexity",), bootstrap_resamples=100)
    right = evaluate_run(run.path, None, settings).candidate.metrics[0].value
    content = run.references_path.read_bytes()
    changed = {
        "cut": content[: content.index(b"\n") + 1],
        "changed": content.replace(b'tokens":', b'tokens":1', 1),
    }
    if damage in changed:
        run.references_path.write_bytes(changed[damage])
    else:
        run.references_path.unlink()
    with pytest.raises(EvaluationError, match=r"reference_likelihoods.jsonl") as caught:
        evaluate_run(run.path, None, settings)
    assert "run `tuneproof infer` again" in str(caught.value.next_step)
    infer(overrides)
    assert evaluate_run(run.path, None, settings).candidate.metrics[0].value == right


def test_interrupted_scoring_goes_on_from_what_was_scored(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = infer({**overrides, "pipeline.runs_dir": overrides["pipeline.runs_dir"] + "-whole"})
    plain, asked = reference_scorer.ReferenceScorer._losses, list[int]()

    def failing(self: Any, batch: Any) -> Any:
        if len(asked) == 2:
            raise RuntimeError("the machine is gone")
        asked.append(len(batch))
        return plain(self, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the machine is gone"):
        patch.setattr(reference_scorer.ReferenceScorer, "_losses", failing)
        infer(overrides, batch_size=2)
    partial_path = run_of(overrides).references_path.with_suffix(f".partial-{REFERENCE_SCORER}.jsonl")
    assert len(partial_path.read_bytes().splitlines()) == 4
    with partial_path.open("ab") as file:
        file.write(b'{"id": "torn')
    asked = count_scored(monkeypatch)
    manifest = infer(overrides)
    assert sum(asked) == len(QUESTIONS) - 4
    assert manifest.reference_perplexity == pytest.approx(whole.reference_perplexity, rel=1e-5)
    assert not partial_path.exists()


def test_a_reference_of_nan_is_unscored_with_its_reason_and_no_mean_is_nan(
    overrides: dict[str, Any], model_copy: Path, tiny_tokenizer: Any
) -> None:
    sound = infer({**overrides, "pipeline.runs_dir": overrides["pipeline.runs_dir"] + "-sound"})
    others = set(tiny_tokenizer.encode(" ".join([*QUESTIONS, *ANSWERS[:-1]])))
    token = next(token for token in tiny_tokenizer.encode(ANSWERS[-1]) if token not in others)
    break_weight(model_copy, "model.embed_tokens.weight", token, math.nan)
    manifest = infer({**overrides, "inferencer.model": str(model_copy)})
    assert manifest.error_count == 0
    assert manifest.reference_perplexity is not None and math.isfinite(manifest.reference_perplexity)
    assert manifest.reference_tokens is not None and sound.reference_tokens is not None
    assert 0 < manifest.reference_tokens < sound.reference_tokens
    scores = read_likelihoods(run_of(overrides).references_path)
    rows = list(read_predictions(run_of(overrides).predictions_path))
    batch = scores(rows)
    assert batch.reasons[:-1] == [None] * 8 and all(map(math.isfinite, batch.values["perplexity"][:-1]))
    assert "NaN or infinite over the reference (1 weight holds NaN" in str(batch.reasons[-1])


def test_when_every_row_is_an_error_the_files_are_there_and_the_cause_is_named(
    overrides: dict[str, Any], model_copy: Path
) -> None:
    break_weight(model_copy, "model.layers.1.mlp.down_proj.weight", (3, 5), math.inf)
    manifest = infer({**overrides, "inferencer.model": str(model_copy)})
    assert manifest.error_count == manifest.row_count == len(QUESTIONS)
    assert manifest.reference_perplexity is None
    path = run_of(overrides).predictions_path
    with pytest.raises(NoAnswerError, match=r"all 9 rows of run .* \(model.layers.1.mlp.down_proj.weight\)"):
        refuse_without_answers(path, manifest)
    refuse_without_answers(path, manifest.model_copy(update={"error_count": 8}))


def test_progress_counts_references_and_leaves_out_rows_without_one(
    overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(overrides["inferencer.testing_data_id"])
    path.write_text(path.read_text() + '\n{"question": "What is there to say?", "answer": null}\n')
    monkeypatch.setattr("tasks.core.runs.progress.ProgressMeter.add", _told_at_each_row)
    inferencer = Inferencer(load_config(None, {**overrides, "inferencer.batch_size": 2}))
    seen: list[tuple[int, int]] = []
    inferencer.on_reference_progress = lambda told: seen.append((told.rows_done, told.rows_total))
    inferencer.infer()
    count = len(QUESTIONS)
    assert seen == [*((done, count) for done in range(1, count + 1)), (count, count)]


def _told_at_each_row(meter: Any, tokens: int, batch_size: int, *, error: bool) -> None:
    meter._done += 1
    meter.report_now()
