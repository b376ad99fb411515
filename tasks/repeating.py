"""Some rows of a run answered again, in other batches: how far its answers depend on chance of the machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.core.config import with_overrides
from tasks.core.errors import TuneproofError
from tasks.core.evaluation.noise import evenly_spread, repeat_name, why_no_noise
from tasks.core.records import Example, RunManifest
from tasks.inferencer import Inferencer, PreparedRows

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Few enough together that each row has other neighbours than before.
_BATCHES = 4


class RepeatedRows(Inferencer):
    """Answers `gate.noise_rows` rows of another run again, in a run of its own inside that run's folder."""

    @classmethod
    def of(cls, original: Inferencer, prepared: PreparedRows) -> RepeatedRows:
        """Share the model of an Inferencer that has answered `prepared`."""
        rows = min(original.config.gate.noise_rows, len(prepared.rows))
        config = with_overrides(
            original.config,
            {
                "pipeline.runs_dir": original.runs.address_of(prepared.run.path.name),
                "gate.noise_rows": rows,
                "inferencer.run_name": repeat_name(rows),
                "inferencer.run_name_prefix": "",
                "inferencer.run_name_suffix": "",
                "inferencer.batch_size": -(-rows // _BATCHES),
                "inferencer.num_shards": 1,
                "inferencer.score_references": False,
            },
        )
        repeated = cls(config, model=original.discover().chosen.model_id, budget_store=original.budget_store)
        repeated._discovery, repeated._loaded = original._discovery, original._loaded
        return repeated

    def examples(self, dataset: Dataset) -> Iterator[Example]:
        """Give rows from all parts of the data; their ids are those of the whole."""
        chosen = evenly_spread(self.config.gate.noise_rows, len(dataset))
        return (example for number, example in enumerate(super().examples(dataset)) if number in chosen)


def is_repeated(inferencer: Inferencer, manifest: RunManifest) -> bool:
    """Tell whether rows of a run are answered again: they are wanted, and can depend on the batches."""
    return inferencer.config.gate.noise_rows > 0 and why_no_noise(manifest) is None


@task(cache_policy=NO_CACHE, persist_result=False)
def repeat_some_rows(inferencer: Inferencer, prepared: PreparedRows, manifest: RunManifest) -> None:
    """Answer a few rows again for the gate, if their answers can depend on the batches; never fails the run."""
    if not is_repeated(inferencer, manifest):
        return
    repeated = RepeatedRows.of(inferencer, prepared)
    try:
        again = repeated.infer()
        prepared.sync.pull()  # at a URL the repeat is a run with a mirror of its own
        logger.info("%d rows are answered twice, to measure the noise", again.row_count)
    except TuneproofError as error:
        logger.warning("the noise could not be measured: %s", error)
    finally:
        repeated.release_model()
