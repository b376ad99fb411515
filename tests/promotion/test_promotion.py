"""Promotion: what moves the alias, what is refused, the way back, the history, and two at once."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from flows.cli.commands import main
from flows.cli.commands.models import list_models
from tasks.core.config import load_config, with_overrides
from tasks.core.errors import ModelLoadError, ModelNotFoundError, PromotionError
from tasks.core.evaluation.outputs import EvaluationFiles, read_summary
from tasks.core.evaluation.summary import GateCheck, Verdict
from tasks.core.models.digests import weights_sha256
from tasks.core.models.trained import alias
from tasks.core.models.trained.discovery import discover_model
from tasks.core.models.trained.registry import promoted_run, write_manifest
from tasks.core.promotion.promotion import (
    Actor,
    Evidence,
    PromotedScore,
    Promotion,
    current_promotion,
    promote,
    promotion_history,
    roll_back,
)
from tasks.evaluator import Evaluator
from tasks.promoter import Promoter
from tests.making.evaluation_runs import sums, write_run
from tests.making.model_runs import make_run, manifest_of

ANNA = Actor("anna@office")


@pytest.fixture
def models(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """Three complete models."""
    for name in ("one", "two", "three"):
        make_run(tmp_path / "models", name, base=tiny_model_dir)
    return tmp_path / "models"


def evidence(models_dir: Path, run_name: str, decision: Any = "promote", **changes: Any) -> Evidence:
    """An evaluation with that verdict."""
    reason = f"The candidate {run_name} was looked at."
    verdict = Verdict(
        decision=decision,
        primary_metric="exact_match",
        against="base",
        against_run="base",
        reasons=(reason,),
        checks=(GateCheck(name="Exact match is the primary metric", outcome="passed", detail=reason),),
    )
    fields: dict[str, Any] = {
        "run_name": run_name,
        "run_key": "f" * 64,
        "weights_sha256": weights_sha256(models_dir / run_name),
        "opponent_run_name": "base",
        "opponent_run_key": None,
        "champion": changes["champion"] if "champion" in changes else promoted_run(models_dir),
        "dataset_id": "data/sums.jsonl",
        "dataset_split": "test",
        "rows": 100,
        "scores": (PromotedScore(metric="exact_match", value=0.75, interval=None, opponent_value=0.25),),
        "verdict": verdict,
        "evaluated_at": "2026-01-01T00:00:00+00:00",
        "summary_path": "runs/one/evaluator_output_summary.json",
        **changes,
    }
    return Evidence(**fields)


def promote_in_turn(models: Path, *names: str) -> list[Promotion]:
    return [promote(models, name, ANNA, evidence(models, name)) for name in names]


def test_a_promotion_says_what_when_by_whom_and_on_which_evidence(models: Path) -> None:
    promoted = promote(models, "one", ANNA, evidence(models, "one"))
    assert current_promotion(models) == promoted
    assert (promoted.run_name, promoted.promoted_by, promoted.forced) == ("one", "anna@office", False)
    assert promoted.evidence is not None and promoted.evidence.scores[0].value == 0.75
    (entry,) = promotion_history(models)
    assert (entry.action, entry.replaced, entry.promotion) == ("promote", None, promoted)


def test_the_promoted_model_is_what_discovery_gives(models: Path) -> None:
    promote_in_turn(models, "one", "two")
    found = discover_model(model="promoted", hf_user_id=None, models_dir=models).chosen
    assert (found.model_id, found.source) == (str(models / "two"), "promoted")


@pytest.mark.parametrize("decision", ["reject", "inconclusive"])
def test_another_verdict_is_refused_and_changes_nothing(models: Path, decision: str) -> None:
    with pytest.raises(PromotionError, match=rf"the verdict about one is {decision}: The candidate one"):
        promote(models, "one", ANNA, evidence(models, "one", decision))
    assert current_promotion(models) is None
    assert promotion_history(models) == []


def test_force_promotes_against_the_verdict_and_is_recorded_with_its_reason(models: Path) -> None:
    with pytest.raises(PromotionError, match="needs a reason"):
        promote(models, "one", ANNA, None, force=True)
    promoted = promote(models, "one", Actor("anna", "the test set is broken"), None, force=True)
    assert promoted.forced
    assert promotion_history(models)[0].reason == "the test set is broken"


def test_force_that_was_not_needed_is_not_held_against_a_model(models: Path) -> None:
    promoted = promote(models, "one", Actor("anna", "sure"), evidence(models, "one"), force=True)
    assert not promoted.forced


def test_files_that_changed_after_the_evaluation_are_refused(models: Path) -> None:
    found = evidence(models, "one", weights_sha256="0" * 64)
    with pytest.raises(PromotionError, match="the files of one have changed since its evaluation"):
        promote(models, "one", ANNA, found)


def test_a_verdict_that_does_not_know_the_present_champion_is_refused(models: Path) -> None:
    late = evidence(models, "two")
    promote_in_turn(models, "one")
    with pytest.raises(PromotionError, match="compares it with no champion, but the champion is one now"):
        promote(models, "two", ANNA, late)
    assert promoted_run(models) == "one"


def test_a_model_that_is_not_complete_or_not_there_cannot_be_promoted(
    models: Path, tiny_model_dir: Path
) -> None:
    make_run(models, "unfinished", base=tiny_model_dir, finished_at=None)
    for name, problem in (("unfinished", "no tuneproof_manifest.json"), ("none", "no such directory")):
        with pytest.raises(PromotionError, match=problem):
            promote(models, name, Actor("anna", "because"), None, force=True)


def test_rollback_goes_back_one_by_one_to_the_first(models: Path) -> None:
    first, second, _ = promote_in_turn(models, "one", "two", "three")
    assert roll_back(models, ANNA)[0] == second
    assert roll_back(models, Actor("ben", "worse in use"))[0] == first
    assert current_promotion(models) == first
    with pytest.raises(PromotionError, match="one is the first promoted model"):
        roll_back(models, ANNA)
    actions = [(entry.action, entry.promotion.run_name) for entry in promotion_history(models)]
    assert actions == [
        *(("promote", name) for name in ("one", "two", "three")),
        ("rollback", "two"),
        ("rollback", "one"),
    ]
    assert promotion_history(models)[-1].reason == "worse in use"


def test_a_promotion_after_a_rollback_goes_back_to_the_one_in_force_then(models: Path) -> None:
    promote_in_turn(models, "one", "two")
    roll_back(models, ANNA)
    promote_in_turn(models, "three")
    assert roll_back(models, ANNA)[0].run_name == "one"


def test_promoting_the_promoted_model_again_changes_nothing_and_keeps_the_way_back(models: Path) -> None:
    _, second = promote_in_turn(models, "one", "two")
    assert promote(models, "two", ANNA, evidence(models, "two")) == second
    assert promote(models, "two", Actor("anna", "once more"), None, force=True) == second
    assert len(promotion_history(models)) == 2
    assert roll_back(models, ANNA)[0].run_name == "one"


def test_a_promoted_model_whose_files_changed_is_promoted_anew(models: Path) -> None:
    (first,) = promote_in_turn(models, "one")
    weights = models / "one" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert promote_in_turn(models, "one") != [first]


def test_rollback_without_anything_promoted_says_so(models: Path) -> None:
    with pytest.raises(PromotionError, match="nothing is promoted"):
        roll_back(models, ANNA)


def test_rollback_to_a_model_that_is_gone_or_changed_is_refused_and_changes_nothing(models: Path) -> None:
    promote_in_turn(models, "one", "two")
    weights = models / "one" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(PromotionError, match="the files of one have changed since it was promoted"):
        roll_back(models, ANNA)
    (models / "one").rename(models / "away")
    with pytest.raises(PromotionError, match="there is no such directory"):
        roll_back(models, ANNA)
    assert promoted_run(models) == "two"


def test_a_pointer_made_by_hand_is_history_too(models: Path) -> None:
    (models / "promoted.json").write_text(json.dumps({"run_name": "one"}))
    promote_in_turn(models, "two")
    assert roll_back(models, ANNA)[0].run_name == "one"


def test_a_torn_line_of_the_history_does_not_swallow_the_next(models: Path) -> None:
    promote_in_turn(models, "one")
    with (models / "promotions.jsonl").open("a") as file:
        file.write('{"action": "prom')
    promote_in_turn(models, "two")
    assert [entry.promotion.run_name for entry in promotion_history(models)] == ["one", "two"]


def test_a_damaged_pointer_is_told_and_can_be_replaced_by_force(models: Path) -> None:
    (models / "promoted.json").write_text('{"run_name": "one", "forced": "perhaps"}')
    with pytest.raises(ModelLoadError, match=r"promoted\.json is damaged"):
        promote(models, "two", ANNA, evidence(models, "two"))
    promote(models, "two", Actor("anna", "repair"), None, force=True)
    assert promoted_run(models) == "two"


@pytest.mark.parametrize("decision", ["promote", "reject"])
def test_a_pointer_that_cannot_be_read_is_repaired_as_its_error_advises(models: Path, decision: str) -> None:
    promote_in_turn(models, "one", "two")
    found = evidence(models, "two", decision)
    (models / "promoted.json").write_text("{ damaged")
    with pytest.raises(ModelLoadError, match=r"names no run.*\n.*--force"):
        promote(models, "two", ANNA, found)
    promoted = promote(models, "two", Actor("anna", "repair"), found, force=True)
    assert promoted.forced and promoted_run(models) == "two"
    assert roll_back(models, ANNA)[0].run_name == "one"


def test_models_are_listed_though_the_pointer_is_damaged_which_is_told(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "promoted.json").write_text("{ damaged")
    list_models(load_config(overrides={"pipeline.models_dir": str(models)}, environ={}))
    shown = capsys.readouterr()
    assert "names no run" in shown.out + shown.err and "three" in shown.out


def _promote_often(models_dir: str, name: str) -> None:
    for number in range(6):
        model = "three" if number % 2 else name
        promote(Path(models_dir), model, Actor(name, "at once"), None, force=True)


def test_promotions_of_two_processes_never_mix(models: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_promote_often, args=(str(models), name)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    entries = promotion_history(models)
    assert {entry.promotion.run_name for entry in entries} == {"one", "two", "three"}
    assert entries[-1].promotion == current_promotion(models)
    for before, after in itertools.pairwise(entries):
        assert after.replaced == before.promotion.run_name


def test_a_second_promotion_waits_and_then_says_that_one_is_going_on(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alias, "_LOCK_SECONDS", 0.1)
    with alias.locked(models), pytest.raises(PromotionError, match="another promotion"):
        promote_in_turn(models, "one")


# --- by the name of a model or of its evaluated run


@pytest.fixture
def promoter(models: Path, tmp_path: Path) -> Promoter:
    """Models one and two, of which one was evaluated as better than its base and two as no better."""
    runs = tmp_path / "runs"
    write_run(runs / "base", sums(100, 20))
    config = load_config(
        overrides={
            "pipeline.runs_dir": str(runs),
            "pipeline.models_dir": str(models),
            "evaluator.metrics": ["exact_match"],
            "evaluator.bootstrap_resamples": 200,
            "evaluator.baseline": "base",
        },
        environ={},
    )
    for name, right in (("one", 60), ("two", 20)):
        write_manifest(models / name, manifest_of(name, chat_template_sha256="c" * 64))
        digest = weights_sha256(models / name)
        write_run(runs / f"run-of-{name}", sums(100, right), model_id=str(models / name), adapter=digest)
        Evaluator(config, run=f"run-of-{name}", baseline=runs / "base").score()
    return Promoter(config, by="anna")


@pytest.mark.parametrize("name", ["one", "run-of-one"])
def test_a_model_is_promoted_by_its_name_or_that_of_its_run(promoter: Promoter, name: str) -> None:
    promoted = promoter.promote(name)
    assert (promoted.run_name, promoted.promoted_by) == ("one", "anna")
    assert promoted.evidence is not None
    assert promoted.evidence.scores[0].model_dump(exclude={"interval"}) == {
        "metric": "exact_match",
        "value": 0.6,
        "opponent_value": 0.2,
    }


def test_a_model_that_is_no_better_or_was_not_evaluated_is_refused(promoter: Promoter) -> None:
    with pytest.raises(PromotionError, match="the verdict about two is inconclusive: No difference"):
        promoter.promote("two")
    with pytest.raises(PromotionError, match="three was not compared with any model"):
        promoter.promote("three")


def test_the_evaluation_of_a_run_at_a_url_is_brought_here_first(
    promoter: Promoter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "empty-cache"))
    elsewhere = {"pipeline.runs_dir": (tmp_path / "runs").as_uri()}
    promoted = Promoter(with_overrides(promoter.config, elsewhere)).promote("one")
    assert promoted.evidence is not None and promoted.evidence.run_name == "run-of-one"


def test_the_command_says_when_a_model_is_promoted_already(
    promoter: Promoter, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    pipeline = promoter.config.pipeline
    folders = (f"--pipeline.runs_dir={pipeline.runs_dir}", f"--pipeline.models_dir={pipeline.models_dir}")
    assert main(["promote", "one", *folders]) == 0
    assert "promoted: one" in capsys.readouterr().out
    assert main(["promote", "one", *folders]) == 0
    assert "one is the promoted model already, by " in capsys.readouterr().out


def test_the_command_says_when_another_one_has_just_promoted_the_same_model(
    promoter: Promoter, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    pipeline = promoter.config.pipeline
    folders = (f"--pipeline.runs_dir={pipeline.runs_dir}", f"--pipeline.models_dir={pipeline.models_dir}")

    def present(self: Promoter) -> Promotion | None:
        found = current_promotion(self.models)
        promoter.promote("one", force=True, reason="the reason of the other one")
        return found

    monkeypatch.setattr(Promoter, "present", present)
    assert main(["promote", "one", *folders, "--force", "--reason", "mine"]) == 0
    assert "one is the promoted model already, by" in capsys.readouterr().out
    (entry,) = promotion_history(promoter.models)
    assert entry.reason == "the reason of the other one"


def test_a_flow_run_that_is_tried_again_promotes_nothing_that_was_taken_back(
    promoter: Promoter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.promotion import promote_if_decided

    roots = promoter.config.pipeline
    promote(Path(roots.models_dir), "three", Actor("anna", "first"), None, force=True)
    summary = read_summary(EvaluationFiles(Path(roots.runs_dir) / "run-of-one").summary_path)
    Promoter(promoter.config, by="robot@worker-1, flow run 0a1b").promote("one", reason="better", force=True)
    roll_back(Path(roots.models_dir), ANNA)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "0a1b")
    assert promote_if_decided(promoter.config, summary) is None
    assert promoted_run(Path(roots.models_dir)) == "three"
    assert "this flow run promoted the model of run-of-one, which was taken back" in caplog.text


def test_an_unknown_name_lists_what_is_there(promoter: Promoter) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model 'four' in .*; there are: .*one"):
        promoter.promote("four")
    with pytest.raises(PromotionError, match="the run base was not evaluated, or its model is not in"):
        promoter.promote("base")


def test_the_card_carries_the_scores_for_readers_and_for_the_hub(promoter: Promoter) -> None:
    from huggingface_hub import ModelCard

    from tasks.core.promotion.card import write_scored_card

    promoted = promoter.promote("one")
    for _ in range(2):  # the second time it replaces its own section
        path = write_scored_card(promoter.models_dir / "one", promoted)
    text = path.read_text()
    assert text.count("## Evaluation") == 1
    assert "| exact_match | 0.6000 [" in text and "Optimizer steps" in text
    (result,) = ModelCard.load(path).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("exact_match", 0.6, "sums")


class RecordingHub:
    """Stands in for huggingface_hub.HfApi."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append((repo_id, options))
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


@pytest.mark.parametrize("private", [True, False])
def test_a_promoted_model_is_pushed_as_private_unless_asked_otherwise(
    promoter: Promoter, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    hub = RecordingHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    asked = {"pipeline.push_promoted": True, "fine_tuner.hf_user_id": "anna"}
    if not private:
        asked["pipeline.push_private"] = False
    Promoter(with_overrides(promoter.config, asked)).promote("one")
    (repo_id, options), (_, upload) = hub.calls
    assert (repo_id, options["private"]) == ("anna/one", private)
    assert "## Evaluation" in (Path(upload["folder_path"]) / "README.md").read_text()


def test_a_hub_that_does_not_answer_takes_no_promotion_back(
    promoter: Promoter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unreachable(RecordingHub):
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi", Unreachable)
    asked = {"pipeline.push_promoted": True, "fine_tuner.hf_user_id": "anna"}
    Promoter(with_overrides(promoter.config, asked)).promote("one")
    assert promoted_run(promoter.models_dir) == "one"
    assert "one is promoted, but not on the Hub" in caplog.text
