"""The works: infer, finetune, evaluate, promote, reject, rollback; their right ends, and how harm is counted."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.torture_parts.stage import NEW_TOKENS, State, Work, digest_of, doubled_lines
from bench.torture_parts.trials import Harm

if TYPE_CHECKING:
    from bench.torture_parts.stage import Stage
    from tasks.core.config import Config

BATCH_ROWS = 4
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+.:\d]*")
_EVALUATED_ROWS = 60


def all_works(stage: Stage) -> list[Work]:
    """Make the beginnings where they are not there yet; return all works."""
    begins = stage.folder / "begins"
    empty = begins / "empty"
    empty.mkdir(parents=True, exist_ok=True)
    evaluated = begins / "evaluated"
    if not (
        begins / "all-promoted"
    ).exists():  # the last that is made; another process may have died before it
        for name in ("unevaluated", "evaluated", "two-promoted", "better"):
            shutil.rmtree(begins / name, ignore_errors=True)
        _write_evaluated(evaluated, stage)
    return [
        Work("infer", empty, functools.partial(infer, stage), _answers, _answers_harm),
        Work("finetune", empty, functools.partial(finetune, stage), _weights),
        Work("evaluate", begins / "unevaluated", functools.partial(evaluate, stage), _scores),
        Work("promote", begins / "two-promoted", functools.partial(promote, stage), _alias, _alias_harm),
        Work("reject", begins / "two-promoted", functools.partial(reject, stage), _alias, _alias_harm, True),
        Work("rollback", begins / "all-promoted", functools.partial(roll_back, stage), _alias, _alias_harm),
    ]


def settings(stage: Stage, place: Path, **changes: Any) -> Config:
    """Return the settings of all works at a place; sampled, so that draws would show any difference."""
    from tasks.core.config import load_config

    values = {
        "inferencer.model": str(stage.model_dir), "inferencer.testing_data_id": str(stage.folder / "rows.jsonl"),
        "inferencer.max_new_tokens": NEW_TOKENS, "inferencer.temperature": 0.8, "inferencer.device": "cpu",
        "inferencer.batch_size": BATCH_ROWS, "inferencer.run_name": "run", "inferencer.seed": 1,
        "fine_tuner.base_model_id": str(stage.model_dir), "fine_tuner.run_name": "trained",
        "fine_tuner.training_data_id": str(stage.folder / "train.jsonl"), "fine_tuner.epochs": 1,
        "fine_tuner.device_train_batch_size": 4, "fine_tuner.grad_accumulation": 1, "fine_tuner.save_steps": 2,
        "fine_tuner.learning_rate": 1e-2, "fine_tuner.device": "cpu", "fine_tuner.log_steps": 1,
        "evaluator.metrics": ["exact_match"], "evaluator.bootstrap_resamples": 200, "evaluator.baseline": "base",
        "pipeline.runs_dir": str(place / "runs"), "pipeline.models_dir": str(place / "models"),
    }  # fmt: skip
    return load_config(None, values | {name.replace("__", "."): value for name, value in changes.items()})


def infer(stage: Stage, place: Path, **changes: Any) -> None:
    """Answer the rows and score their references."""
    from tasks.inferencer import Inferencer

    Inferencer(settings(stage, place, **changes)).infer()


def finetune(stage: Stage, place: Path, **changes: Any) -> None:
    """Train six updates with three checkpoints."""
    from tasks.finetuner import FineTune

    FineTune(settings(stage, place, **changes)).run()


def evaluate(stage: Stage, place: Path) -> None:
    """Score a run, compare it, reach a verdict, write the report."""
    from tasks.evaluator import Evaluator

    Evaluator(settings(stage, place), run="run-of-one", baseline=place / "runs" / "base").run()


def promote(stage: Stage, place: Path, name: str = "three") -> None:
    """Promote a model whose verdict allows it."""
    from tasks.promoter import Promoter

    Promoter(settings(stage, place), by="anna").promote(name, reason="better", force=True)


def promote_by_verdict(stage: Stage, place: Path) -> None:
    """Promote a model that was shown to be better than the champion."""
    from tasks.promoter import Promoter

    Promoter(settings(stage, place), by="anna").promote("best")


def reject(stage: Stage, place: Path) -> None:
    """Ask for a promotion that the verdict does not allow."""
    from tasks.promoter import Promoter

    Promoter(settings(stage, place), by="anna").promote("worse")


def roll_back(stage: Stage, place: Path) -> None:
    """Go back one model."""
    from tasks.promoter import Promoter

    Promoter(settings(stage, place), by="anna").roll_back(reason="worse in use")


def _write_evaluated(folder: Path, stage: Stage) -> None:
    """Models and runs that were evaluated, before and after promotions; each beginning in a folder of its own.

    Everything is made at the place where it will be used, since summaries name paths.
    """
    from tests.making.evaluation_runs import sums, write_run

    shutil.rmtree(stage.place, ignore_errors=True)
    write_run(stage.place / "runs" / "base", sums(_EVALUATED_ROWS, 12))
    for name, right in (("one", 45), ("two", 46), ("three", 47), ("worse", 2)):
        _write_evaluation(stage, name, right=right)
    begins = folder.parent
    shutil.copytree(stage.place, begins / "unevaluated")
    for name in ("one", "two", "three", "worse"):
        _in_process(stage, functools.partial(_evaluate_one, stage, name))
    shutil.copytree(stage.place, folder)
    for name in ("one", "two"):
        _in_process(stage, functools.partial(promote, stage, stage.place, name))
    shutil.copytree(stage.place, begins / "two-promoted")
    _write_evaluation(stage, "best", right=_EVALUATED_ROWS)
    _in_process(stage, functools.partial(_evaluate_one, stage, "best", "champion"))
    shutil.move(stage.place, begins / "better")
    shutil.copytree(begins / "two-promoted", stage.place)
    _in_process(stage, functools.partial(promote, stage, stage.place, "three"))
    shutil.copytree(stage.place, begins / "all-promoted")


def _write_evaluation(stage: Stage, name: str, *, right: int) -> None:
    """A model with weights of its own, and its answers with so many of them right."""
    import numpy as np
    from safetensors.numpy import save_file

    from tasks.core.models.digests import weights_sha256
    from tasks.core.models.trained.registry import write_manifest
    from tests.making.evaluation_runs import sums, write_run
    from tests.making.model_runs import make_run, manifest_of

    model_dir = stage.place / "models" / name
    make_run(model_dir.parent, name, base=stage.model_dir)
    save_file({"lora": np.full((4, 4), right, np.float32)}, model_dir / "adapter_model.safetensors")
    write_manifest(model_dir, manifest_of(name, chat_template_sha256="c" * 64))
    write_run(
        stage.place / "runs" / f"run-of-{name}",
        sums(_EVALUATED_ROWS, right),
        model_id=str(model_dir),
        adapter=weights_sha256(model_dir),
    )


def _evaluate_one(stage: Stage, name: str, baseline: str | Path | None = None) -> None:
    from tasks.evaluator import Evaluator

    place = stage.place
    opponent = place / "runs" / "base" if baseline is None else baseline
    Evaluator(settings(stage, place), run=f"run-of-{name}", baseline=opponent).run()


def _in_process(stage: Stage, work: Any) -> None:
    from bench.torture_parts.trials import command

    ended = command(work, stage.log_path)
    if ended.code != 0:
        raise RuntimeError(f"a beginning could not be made: {ended.told[-2000:]}")


def is_done(work: Work, place: Path, expected: State) -> bool:
    """Whether a rollback was killed so late that nothing of it is open: given again, it would be another one."""
    is_open = (place / "models" / ".promotion.unfinished").exists()
    return work.name == "rollback" and not is_open and work.final(place) == expected


# ---------------------------------------------------------------- what must be there in the end


def _answers(place: Path) -> State:
    """Answers without what may differ, the reference scores, and whether the manifest fits both."""
    run = place / "runs" / "run"
    rows = [json.loads(line) for line in (run / "inferencer_output.jsonl").read_bytes().split(b"\n") if line]
    for row in rows:
        del row["metadata"]["inference_time"], row["metadata"]["batch_size"]
    manifest = json.loads((run / "manifest.json").read_text())
    references = filter(None, (run / "reference_likelihoods.jsonl").read_bytes().split(b"\n"))
    likelihoods = {row["id"]: round(row["negative_log_likelihood"], 3) for row in map(json.loads, references)}
    return {
        "rows": rows,
        "reference scores": likelihoods,
        "perplexity": round(manifest["reference_perplexity"], 2),
        "digest of the answers": manifest["predictions_sha256"] == digest_of(run / "inferencer_output.jsonl"),
        "digest of the references": manifest["references_sha256"]
        == digest_of(run / "reference_likelihoods.jsonl"),
        "row count": manifest["row_count"],
    }


def _answers_harm(place: Path, found: State, expected: State) -> Harm:
    harm = published_harm(place, found, expected)
    harm.doubled += doubled_lines(place / "runs" / "run" / "ledger.jsonl", lambda line: line["id"])
    return harm


def published_harm(place: Path, found: State, expected: State) -> Harm:
    """Rows that are missing, doubled or another model's in the published file."""
    harm = Harm()
    ids, wanted = ([row["id"] for row in state["rows"]] for state in (found, expected))
    harm.lost = len(set(wanted) - set(ids))
    harm.doubled = len(ids) - len(set(ids))
    own = {row["metadata"]["model_id"] for row in expected["rows"]}
    harm.mixed = sum(row["metadata"]["model_id"] not in own for row in found["rows"])
    return harm


def _weights(place: Path) -> State:
    """Digest of the weights, the losses, and the settings that were trained with."""
    trained = place / "models" / "trained"
    manifest = json.loads((trained / "tuneproof_manifest.json").read_text())
    return {
        "weights": digest_of(trained / "adapter_model.safetensors"),
        "losses": [(point["step"], round(point["loss"], 5)) for point in manifest["losses"]],
        "steps": manifest["steps"],
        "trained tokens": manifest["trained_tokens"],
        "tokenizer": digest_of(trained / "tokenizer.json"),
    }


def _scores(place: Path) -> State:
    """Scores, verdict and figures without times; the report and the spreadsheet are there."""
    run = place / "runs" / "run-of-one"
    summary = json.loads(_MOMENT.sub("", (run / "evaluator_output_summary.json").read_text()))
    report = _MOMENT.sub("", (run / "report.html").read_text())
    return {
        "scores": digest_of(run / "scores.jsonl"),
        "summary": json.dumps(_without(summary, "seconds", "content_sha256")),
        "report": len(report) > 1000 and "run-of-one" in report,
        "spreadsheet": (run / "evaluator_output_detailed.xlsx").read_bytes()[:2] == b"PK",
    }


def _without(value: Any, *words: str) -> Any:
    """Leave out fields whose names contain a word."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if not any(word in name for word in words)}
        return {name: _without(item, *words) for name, item in kept.items()}
    return [_without(item, *words) for item in value] if isinstance(value, list) else value


def history(place: Path) -> list[tuple[str, str, str | None]]:
    """The changes of the alias: what was done, the model, the one that it replaced."""
    from tasks.core.promotion.promotion import promotion_history

    lines = promotion_history(place / "models")
    return [(one.action, one.promotion.run_name, one.replaced) for one in lines]


def pointer(place: Path) -> str | None:
    """The promoted model's name, as the pointer says it."""
    path = place / "models" / "promoted.json"
    return json.loads(path.read_text())["run_name"] if path.is_file() else None


def _alias(place: Path) -> State:
    return {"pointer": pointer(place), "history": history(place)}


def _alias_harm(place: Path, found: State, expected: State) -> Harm:
    harm = Harm()
    lines, right = found["history"], expected["history"]
    harm.doubled = max(0, len(lines) - len(right))
    harm.lost = max(0, len(right) - len(lines))
    if lines and lines[-1][1] != found["pointer"]:
        harm.mixed, harm.notes = 1, [f"pointer {found['pointer']}, history ends with {lines[-1][1]}"]
    return harm
