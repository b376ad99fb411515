"""Where a plan is answered: the one place that decides it."""

from __future__ import annotations

import multiprocessing

from tasks.core.errors import ConfigError
from tasks.core.generation.plan import Answerer, Report, Runner, RunPlan
from tasks.core.generation.runners.child import Child
from tasks.core.generation.runners.here import Here
from tasks.core.generation.runners.isolation import is_isolated
from tasks.core.generation.runners.processes import Processes
from tasks.core.runs.ledger import LedgerIndex


def answer_plan(plan: RunPlan, answerer: Answerer, report: Report | None) -> LedgerIndex:
    """Answer what is missing of a plan, where the settings say; who answers lets go of its model for another process.

    Raises TypeError for what is no plan.
    """
    if not isinstance(plan, RunPlan):
        raise TypeError(
            f"generate_responses takes what process_dataset(dataset) returns, not a {type(plan).__name__}"
        )
    runner = choose_runner(plan, answerer)
    if not isinstance(runner, Here):
        answerer.release_model()  # its memory is for the process that answers
    return runner.answer(plan, report)


def choose_runner(plan: RunPlan, answerer: Answerer, *, mapped: Runner | None = None) -> Runner:
    """Choose by the settings: shards as they say, else in a child process where they want one, else here.

    `mapped` answers the shards of a run where a flow is running. Without it shards are answered one after the other
    (`threads`) or in processes; raises ConfigError for Dask and Ray, which need a flow.
    """
    settings = plan.config.inferencer
    if plan.is_split:
        if mapped is not None:
            return mapped
        if settings.shard_runner not in ("threads", "processes"):
            raise ConfigError(
                f'shard_runner = "{settings.shard_runner}" needs a Prefect flow',
                'run `tuneproof infer` (or the flow `infer`), or set shard_runner to "processes" or "threads"',
            )
        return Here(answerer) if settings.shard_runner == "threads" else Processes()
    # A worker of a cluster may be one that Python lets have no children.
    may_have_children = not multiprocessing.current_process().daemon
    is_in_child = may_have_children and is_isolated(settings.isolation, settings.device)
    return Child(report_references=answerer.on_reference_progress) if is_in_child else Here(answerer)
