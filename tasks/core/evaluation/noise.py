"""The noise floor: rows that the same model answered twice, in batches of another make-up.

In bfloat16, or with other kernels, a model's answer can depend on the rows beside it. How far it does is
measured on a few rows; a difference between two models that is no larger says nothing about the models.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.core.config import with_overrides
from tasks.core.errors import EvaluationError
from tasks.core.evaluation.figures import TIE, rounded
from tasks.core.evaluation.gate.case import NoiseFloor
from tasks.core.evaluation.scoring import ScoreTable
from tasks.core.generation.engines.base import exact_in_float32
from tasks.core.generation.engines.choosing import engine_classes
from tasks.core.generation.plan import RunPlan
from tasks.core.metrics.metric import Metric
from tasks.core.records import RunManifest
from tasks.core.runs.run_dir import RunDir
from tasks.core.storage.store import Store

REPEAT_PREFIX = "repeat-"
# Few enough together that each row has other neighbours than before.
_BATCHES = 4


def repeat_name(rows: int) -> str:
    """Name of the run, inside the run's own folder, that answers some of its rows again."""
    return f"{REPEAT_PREFIX}{rows}"


def evenly_spread(count: int, total: int) -> frozenset[int]:
    """Positions of `count` rows from all parts of `total`; all of them where there are fewer."""
    return frozenset(total * i // count for i in range(count)) if count < total else frozenset(range(total))


def repeat_of(plan: RunPlan) -> RunPlan:
    """Plan `gate.noise_rows` rows, from all parts of a run, once more, as a run of its own inside the run's folder."""
    chosen = evenly_spread(plan.config.gate.noise_rows, len(plan.rows))
    rows, directory = plan.rows.only(chosen), plan.store.address_of(plan.run_name)
    config = with_overrides(
        plan.config,
        {
            "pipeline.runs_dir": directory,
            "gate.noise_rows": len(chosen),
            "inferencer.run_name": repeat_name(len(chosen)),
            "inferencer.run_name_prefix": "",
            "inferencer.run_name_suffix": "",
            "inferencer.batch_size": -(-len(chosen) // _BATCHES),
            "inferencer.num_shards": 1,
            "inferencer.score_references": False,
        },
    )
    of_these = {"rows_sha256": rows.rows_sha256, "row_count": len(rows)}
    return replace(
        plan,
        rows=rows,
        identity=plan.identity.model_copy(update=of_these),
        config=config,
        run_name=repeat_name(len(chosen)),
        store=Store(directory),
    )


def why_no_noise(manifest: RunManifest) -> str | None:
    """Why the answers of a run cannot depend on the batches; None when they may."""
    if (
        manifest.identity.model.is_float32
        and manifest.device == "cpu"
        and exact_in_float32(engine_classes().get(manifest.engine))
    ):
        return "float32 answers on a CPU do not depend on the batches"
    return None


def find_repeat(run_path: Path) -> Path | None:
    """The finished run with the most rows that were answered again; None without any."""
    found = []
    for path in run_path.glob(f"{REPEAT_PREFIX}*") if run_path.is_dir() else ():
        try:
            found.append((RunDir(path).read_manifest().row_count, path))
        except EvaluationError:
            continue
    return max(found, default=(0, None))[1]


def noise_floor(run_path: Path, table: ScoreTable, repeated: ScoreTable | None, metric: Metric) -> NoiseFloor:
    """How far the scores of the same rows differ when the model answers them again: the mean absolute difference.

    `table` has the scores of the run, `repeated` those of `find_repeat`.
    """
    if run_path.is_dir():
        reason = why_no_noise(RunDir(run_path).read_manifest())
        if reason is not None:
            return NoiseFloor(0.0, reason=reason)
    if repeated is None:
        return NoiseFloor(None, reason="no rows were answered twice (gate.noise_rows)")
    position = {identifier: i for i, identifier in enumerate(table.ids)}
    pairs = [(position[name], i) for i, name in enumerate(repeated.ids) if name in position]
    if not pairs:
        return NoiseFloor(None, reason="the rows that were answered twice are not in this run")
    first, second = np.array(pairs).T
    changes = np.abs(table.values[metric.name][first] - repeated.values[metric.name][second])
    changes = changes[~np.isnan(changes)]
    if not len(changes):
        return NoiseFloor(None, reason=f"no row that was answered twice is scored by {metric.name}")
    return NoiseFloor(rounded(float(changes.mean())), len(changes), int(np.count_nonzero(changes > TIE)))
