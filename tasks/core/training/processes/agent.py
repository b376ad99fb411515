"""torch's elastic agent, which hears what its processes say, bounds how often they die, and leaves none of them.

Importing this module loads torch; import it inside functions.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from tasks.core.children import told_again
from tasks.core.errors import TrainingError
from tasks.core.interruption import raise_if_interrupted, unheard_by_children
from tasks.core.records import TrainingRestart
from tasks.core.training import checkpoints
from tasks.core.training.processes.child import Broke, Failed, RankLine, begin
from tasks.core.training.processes.journal import Journal
from tasks.core.training.processes.work import Report, TrainingWork

logger = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_SHORTAGES = 32  # halving the rows at once takes fewer
_LAST_WORDS_SECONDS = 5.0
_KILL_SECONDS = 10
_SIGNALS_VARIABLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_NATIVE_LOG_VARIABLE = "TORCH_CPP_LOG_LEVEL"


class Agent(LocalElasticAgent):
    """Starts the processes of a work, and again from the newest checkpoint when one of them has died."""

    def __init__(self, work: TrainingWork, work_path: Path, report: Report | None) -> None:
        self.error: BaseException | None = None
        """What a process had to tell, so that nothing is begun again."""
        self._work, self._report = work, report
        checkpoints_dir = work.model_dir / checkpoints.CHECKPOINTS
        self._journal = Journal.of(checkpoints_dir, work.group_id, tidies=True)
        self._deaths = self._shortages = 0
        self._broke: dict[int, str] = {}
        self._begun: ExitStack | None = None
        self._ears: list[threading.Thread] = []
        rendezvous = RendezvousParameters(
            backend="c10d", endpoint="localhost:0", run_id=work.group_id, min_nodes=1, max_nodes=1, local_addr=_HERE
        )  # fmt: skip
        spec = WorkerSpec(
            role="training",
            local_world_size=work.processes,
            entrypoint=begin,
            args=(str(work_path),),
            rdzv_handler=get_rendezvous_handler(rendezvous),
            max_restarts=work.most_restarts + _SHORTAGES,
            local_addr=_HERE,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull), start_method="spawn")

    def run_to_end(self) -> None:
        """Run until all have ended well or `error` is set. Raises TrainingError after too many deaths."""
        try:
            self.run()
        finally:
            self._hear_out()
            self._worker_group.spec.rdzv_handler.shutdown()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._hear_out()
        spec = worker_group.spec
        work_path, *_ = spec.args
        with unheard_by_children(), _no_handlers_of_the_agent():
            spec.args = (work_path, self._lines())
            try:
                return dict(super()._start_workers(worker_group))
            finally:
                for line in spec.args[1]:
                    line.messages.close()
                spec.args = (work_path,)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        raise_if_interrupted()
        if self.error is not None:
            raise self.error
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        restart = self._end_of_group()
        if self.error is not None:
            raise self.error
        shortages = len(self._journal.memory_events) if self._work.strategy == "fsdp" else 0
        if shortages > self._shortages:  # the others go on from one by themselves
            self._shortages = shortages
            logger.warning(
                "memory ran out in a process of the training; all begin again with fewer rows at once"
            )
        else:
            self._deaths += 1
            if self._deaths > self._work.most_restarts:
                raise TrainingError(
                    f"process {restart.rank} of the training ended with {restart.cause}; all have been begun again "
                    f"{self._work.most_restarts} times before",
                    f"the same command goes on from update {restart.step + 1:,}; where the system kills processes "
                    "for their memory, lower device_train_batch_size or processes",
                )
            logger.warning(
                "process %s of the training ended with %s; all begin again after update %d",
                *(restart.rank, restart.cause, restart.step),
            )
            self._journal.note(restart)
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = _KILL_SECONDS) -> None:
        """End all at once: they have nothing to tidy, and what is not sealed does not count."""
        super()._shutdown(signal.SIGKILL, _KILL_SECONDS)

    def _end_of_group(self) -> TrainingRestart:
        """Who ended first and why, as far as it can be told, and the update that is gone on from."""
        codes = self._exit_codes()
        self._hear_out()
        newest = checkpoints.newest_whole(self._journal.path.parent)
        step = 0 if newest is None else checkpoints.step_of(newest)
        # One that a signal has ended said nothing; what the others say comes from that.
        for rank, code in codes.items():
            if code < 0 and code != -signal.SIGTERM:
                return TrainingRestart(cause=f"signal {signal.Signals(-code).name}", rank=rank, step=step)
        for rank, cause in self._broke.items():
            return TrainingRestart(cause=cause, rank=rank, step=step)
        failed = [(rank, code) for rank, code in codes.items() if code > 0] or [(0, 1)]
        return TrainingRestart(cause=f"exit code {failed[0][1]}", rank=failed[0][0], step=step)

    def _exit_codes(self) -> dict[int, int]:
        running = getattr(self._pcontext, "_pc", None)
        processes = [] if running is None else running.processes
        return {rank: process.exitcode or 0 for rank, process in enumerate(processes)}

    def _lines(self) -> tuple[RankLine, ...]:
        """A line to each process, with an ear of ours at its end."""
        context = multiprocessing.get_context("spawn")
        self._begun, self._broke, self._ears = ExitStack(), {}, []
        lines = []
        for rank in range(self._work.processes):
            receiver, sender = context.Pipe(duplex=False)
            logs = self._begun.enter_context(told_again(context)) if rank == 0 else None
            # In a copy of the context, so that Prefect finds the run that progress belongs to.
            ear = threading.Thread(
                target=copy_context().run, args=(self._hear, rank, receiver), name="training-ear", daemon=True
            )
            ear.start()
            self._ears.append(ear)
            lines.append(RankLine(sender, logs))
        return tuple(lines)

    def _hear(self, rank: int, receiver: Connection) -> None:
        with receiver:
            while True:
                try:
                    message = receiver.recv()
                except Exception:  # the other end is gone, perhaps in the middle of a message
                    return
                if isinstance(message, Failed):
                    self.error = self.error or message.error
                elif isinstance(message, Broke):
                    self._broke[rank] = message.cause
                elif self._report is not None and self.error is None:
                    try:
                        self._report(message)
                    except BaseException as error:  # as it would end a training in this process
                        self.error = error

    def _hear_out(self) -> None:
        """Hear the last words of processes that have ended."""
        for ear in self._ears:
            ear.join(_LAST_WORDS_SECONDS)
        if self._begun is not None:
            self._begun.close()
        self._begun, self._ears = None, []


@contextmanager
def _no_handlers_of_the_agent() -> Iterator[None]:
    """Keep the signal handlers there are, in whose place the agent would put its own.

    What torch's native code prints when another process is gone is no news to a person.
    """
    names = (_SIGNALS_VARIABLE, _NATIVE_LOG_VARIABLE)
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(
        {_SIGNALS_VARIABLE: "", _NATIVE_LOG_VARIABLE: before.get(_NATIVE_LOG_VARIABLE, "FATAL")}
    )
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)
