"""Where a plan is answered under Prefect: shards as mapped tasks, under the task runner that the settings choose."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prefect import task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import task_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from tasks.core.config import InferencerConfig
from tasks.core.errors import ConfigError, RunLockedError, TuneproofError
from tasks.core.generation.answering import index_run
from tasks.core.generation.plan import Answerer, Report, RunPlan
from tasks.core.generation.runners.isolation import ChildDiedError
from tasks.core.generation.runners.pool import begin, own_seat
from tasks.core.generation.runners.seats import Seat
from tasks.core.generation.runners.shards import RETRIES, pending_shards, seats, supervised
from tasks.core.interruption import interruptible_threads, raise_if_interrupted, unheard_by_children
from tasks.core.ray_cluster import ray_connection
from tasks.core.runs.ledger import LedgerIndex
from tasks.core.runs.shards import Shard
from tasks.server.retrying import is_passing
from tasks.ui.run_logs import send_core_logs_to_prefect

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.futures import PrefectFuture
    from prefect.tasks import Task

logger = logging.getLogger(__name__)


def retry_shard(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry condition of a shard: anything but a mistake that a person must correct."""
    try:
        state.result()
    except (ChildDiedError, RunLockedError):
        return True
    except TuneproofError as error:
        return is_passing(error)
    except Exception:
        return True
    return False


def _name_of_shard() -> str:
    return f"shard {task_run.parameters['plan'].place.path.name}"


_SHARD_TASK: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": RETRIES,
    "retry_delay_seconds": [2, 15],
    "retry_condition_fn": retry_shard,
    "task_run_name": _name_of_shard,
}


@task(**_SHARD_TASK)
def answer_shard(plan: RunPlan, places: tuple[Seat, ...] = ()) -> None:
    """Answer one shard in this process, which may be on another machine; `places` are a local Dask cluster's."""
    send_core_logs_to_prefect()
    seat = _seat_of_dask_worker(places) if places else own_seat()
    answerer, own_plan = (plan if seat is None else replace(plan, seat=seat)).take_over()
    assert own_plan.part is not None
    answerer.answer_shard(own_plan, own_plan.part)
    get_run_logger().info("shard %s is complete", own_plan.part.name)


@task(**_SHARD_TASK)
def answer_shard_here(answerer: Answerer, plan: RunPlan) -> None:
    """Answer one shard with the model of this process."""
    raise_if_interrupted()
    assert plan.part is not None
    answerer.answer_shard(plan, plan.part)


class Mapped:
    """Answers the shards of a run as mapped tasks; call it within a flow.

    With the runner `threads` it is `answerer` that does the work.
    """

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    def answer(self, plan: RunPlan, report: Report | None = None) -> LedgerIndex:
        """Answer all shards and return where each row's line is. Holds the run directory's lock.

        A shard that fails is retried alone; shards whose process died with the whole pool are submitted again.
        Raises the first shard's error when no retry is left; what was answered is kept.
        """
        with supervised(plan, report) as pending:
            for attempt in range(RETRIES + 1):
                if not pending:
                    break
                try:
                    self._map(plan, pending)
                except BrokenExecutor as exc:
                    if attempt == RETRIES:
                        raise ChildDiedError(
                            f"processes that answer shards keep dying ({exc})",
                            'run it again to resume; isolation = "process" survives running out of memory',
                        ) from exc
                    told = "a process died with its shard (%s); unfinished shards are begun again"
                    logger.warning(told, exc)
                plan.sync.pull()  # shards may have been answered on other machines
                pending = pending_shards(plan, index_run(plan.run, plan.rows))
        return index_run(plan.run, plan.rows)

    def _map(self, plan: RunPlan, pending: Sequence[Shard]) -> None:
        settings, places = plan.config.inferencer, seats(plan, len(pending))
        plans = [replace(plan, part=shard) for shard in pending]
        runner: TaskRunner[Any]
        with _same_server(), _runner(settings, places) as runner:
            if isinstance(runner, ThreadPoolTaskRunner):
                given = {"answerer": unmapped(self._answerer), "plan": plans}
                futures = runner.map(answer_shard_here, given)
            else:
                self._answerer.release_model()
                local_dask = settings.shard_runner == "dask" and not settings.shard_address
                own_places = unmapped(places if local_dask else ())
                with unheard_by_children():  # a pool begins its processes when it gets work
                    futures = runner.map(answer_shard, {"plan": plans, "places": own_places})  # type: ignore[arg-type]
            _raise_first_error(futures)


def _raise_first_error(futures: Sequence[PrefectFuture[Any]]) -> None:
    """Wait for all, so that no shard loses work to another's error; then raise the first error."""
    errors: list[Exception] = []
    for future in futures:
        try:
            future.result()
        except Exception as exc:
            errors.append(exc)
    if errors:
        raise errors[0]


@contextmanager
def _same_server() -> Iterator[None]:
    """Let other processes use the server of this one, temporary or not: without an address each would start its own."""
    if PREFECT_API_URL.value():
        yield
        return
    with get_client(sync_client=True) as client:
        address = str(client.api_url).rstrip("/")
    with temporary_settings({PREFECT_API_URL: address}):
        yield


@contextmanager
def _runner(settings: InferencerConfig, places: Sequence[Seat]) -> Iterator[TaskRunner[Any]]:
    """Start the task runner of the settings; raises ConfigError when it is not installed."""
    if settings.shard_runner == "threads":
        with _thread() as runner:
            yield runner
    elif settings.shard_runner == "processes":
        with _process_pool(places) as runner:
            yield runner
    elif settings.shard_runner == "dask":
        with _dask(settings.shard_address, len(places)) as runner:
            yield runner
    else:
        with _ray(settings.shard_address, wants_gpu=settings.device != "cpu") as runner:
            yield runner


@contextmanager
def _thread() -> Iterator[TaskRunner[Any]]:
    """One device and one model: the shards take turns."""
    pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=1)
    with interruptible_threads() as interrupt, pool as runner:
        try:
            yield runner
        except BaseException:  # leaving the runner waits for the shard at hand
            interrupt()
            raise


@contextmanager
def _process_pool(places: Sequence[Seat]) -> Iterator[TaskRunner[Any]]:
    context = multiprocessing.get_context("spawn")
    free, stop = context.Queue(), context.Event()
    for place in places:
        free.put(place)
    pool = ProcessPoolTaskRunner(max_workers=len(places), initializer=begin, initargs=(free, stop))
    with pool as runner:
        try:
            yield runner
        except BaseException:  # leaving the pool would wait for shards that nobody needs any more
            stop.set()
            for process in multiprocessing.active_children():  # one that is still starting hears nothing
                process.terminate()
            raise


@contextmanager
def _dask(address: str | None, processes: int) -> Iterator[TaskRunner[Any]]:
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as exc:
        raise _not_installed("dask") from exc
    local = {"n_workers": processes, "threads_per_worker": 1, "dashboard_address": None}
    cluster = DaskTaskRunner(address=address) if address else DaskTaskRunner(cluster_kwargs=local)
    with ExitStack() as stack:
        with unheard_by_children():
            runner = stack.enter_context(cluster)
        yield runner


def _seat_of_dask_worker(places: tuple[Seat, ...]) -> Seat:
    """Return the place of this worker of a local cluster, whose workers are named by number."""
    from distributed import get_worker

    return places[int(get_worker().name)]


@contextmanager
def _ray(address: str | None, *, wants_gpu: bool) -> Iterator[TaskRunner[Any]]:
    try:
        import ray
        from prefect_ray import RayTaskRunner
        from prefect_ray.context import remote_options
    except ImportError as exc:
        raise _not_installed("ray") from exc
    with ray_connection(address, shows_output=True), RayTaskRunner(address=address) as runner:
        gpus = ray.cluster_resources().get("GPU", 0) if wants_gpu else 0
        # Ray hides the GPUs from a task that asks for none.
        with remote_options(num_gpus=1 if gpus else 0):
            yield runner


def _not_installed(runner: str) -> ConfigError:
    return ConfigError(
        f'shard_runner = "{runner}", but prefect-{runner} is not installed',
        f"pip install -c constraints.txt 'tuneproof[{runner}]' here and on every worker, "
        'or set shard_runner to "processes"',
    )
