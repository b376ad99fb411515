"""Flows that Prefect's server cannot hold up: what they make is the same when it is stopped, killed or restarted.

Prefect asks its server when a flow begins and ends. A phase of a pipeline that finds no server goes on in the run of
its pipeline; a run that ends while the server is away waits for it a while, and then ends as it would without Prefect.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast
from uuid import UUID

from prefect import Flow, flow_engine, runtime, tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.context import FlowRunContext, TagsContext
from prefect.exceptions import Abort
from prefect.states import Completed, Failed
from prefect.utilities.callables import get_call_parameters

from flows.naming import TAG
from tasks.core.errors import TuneproofError, first_line
from tasks.server.telling import (
    courier,
    forget_events,
    is_away,
    is_of_prefect,
    is_phase,
    keep_events,
    refuses_connections,
    root_of_runs,
    root_run,
    server_answers,
    server_name,
    wait_for_server,
    without_own_run,
)

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("tasks.steady")

_LAST_MESSAGES_SECONDS = 30.0


class _Left(Abort):
    """Leaves Prefect's engine without a word to the server, after the body has ended."""


@dataclass(slots=True)
class _Attempt:
    """What became of a flow's body."""

    run_id: UUID | None = None
    has_ended: bool = False
    result: Any = None
    error: Exception | None = None

    def outcome(self) -> Any:
        """What the body gave, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.result.data if isinstance(self.result, State) else self.result

    def state(self) -> State[Any]:
        """The final state that the server is told."""
        if self.error is not None:
            return Failed(message=f"Flow run encountered an exception: {first_line(self.error)}")
        if isinstance(self.result, State):
            return Completed(name=self.result.name, message=self.result.message)
        return Completed()


_called: ContextVar[_Attempt | None] = ContextVar("called", default=None)


class SteadyFlow(Flow[P, R]):
    """A flow whose body decides how it ends, whatever Prefect's server does meanwhile."""

    _body: Callable[..., R]

    @classmethod
    def of(cls, flow: Flow[P, R]) -> SteadyFlow[P, R]:
        """Make a flow steady."""
        flow.__class__ = cls
        made = cast(SteadyFlow[P, R], flow)
        made._body = flow.fn
        flow.fn = _watched(flow.fn)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the flow; give what its body gives, or raise what it raises."""
        if kwargs.get("return_state"):
            return super().__call__(*args, **kwargs)
        is_top = FlowRunContext.get() is None
        if is_top:
            self._require_server()
        elif not server_answers():
            return self._go_on_without_run(args, kwargs)
        attempt = _Attempt()
        token = _called.set(attempt)
        try:
            # Automations know the phases by the tag; their tasks have none, see below.
            with nullcontext() if is_top else tags(TAG):
                return super().__call__(*args, **kwargs)
        except _Left:
            pass
        except Exception as error:
            if error is attempt.error or not (is_of_prefect(error) or attempt.has_ended):
                raise
            if not attempt.has_ended and is_top:
                raise _not_there() from error
            if not attempt.has_ended:
                if not is_away(error):
                    raise
                return self._go_on_without_run(args, kwargs)
            if not is_away(error):  # the work is done all the same
                logger.warning("Prefect could not end %s: %s", self.name, first_line(error))
                return attempt.outcome()
        finally:
            _called.reset(token)
        self._tell_end(attempt, is_top=is_top)
        return attempt.outcome()

    def _require_server(self) -> None:
        """Raise TuneproofError when there is no server to begin with; one that hangs is waited for."""
        if server_answers():
            return
        if refuses_connections() or not wait_for_server(f"to begin {self.name}"):
            raise _not_there()

    def _go_on_without_run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        logger.warning("%s does not answer: %s goes on in the run of its pipeline", server_name(), self.name)
        parameters = self.validate_parameters(get_call_parameters(self._body, args, kwargs))
        with without_own_run(), TagsContext(current_tags=set()):
            result = self._body(**parameters)
        return result.data if isinstance(result, State) else result

    def _tell_end(self, attempt: _Attempt, *, is_top: bool) -> None:
        """Say what the server was not told; the end of a phase is told when it is back."""
        if is_top or attempt.run_id is None:
            logger.warning(
                "%s does not answer: it was not told how %s ended. Nothing else is missing: all files are written",
                *(server_name(), self.name),
            )
            return
        run_id, state, name = attempt.run_id, attempt.state(), self.name

        def tell() -> None:
            with get_client(sync_client=True) as client:
                answer = client.set_flow_run_state(run_id, state)
                # One that was told twice, since the first answer was lost, is refused and has ended.
                is_told = answer.status == SetStateStatus.ACCEPT or (
                    client.read_flow_run(run_id).state_type == state.type
                )
            if not is_told:
                logger.warning(
                    "Prefect did not take that %s has ended (%s); all files are written", name, answer.details
                )

        courier().send(f"the end of {self.name}", tell)


def _watched(body: Callable[..., R]) -> Callable[..., R]:
    """Let the body be watched; its annotations are still read where they were written."""

    def run(*args: Any, **kwargs: Any) -> R:
        return watch(body, args, kwargs)

    watch = _watch
    there = FunctionType(run.__code__, body.__globals__, body.__name__, None, run.__closure__)
    return functools.wraps(body)(there)


def _watch(body: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    """Note how the body ends, and see to it that Prefect can tell it to the server."""
    called = _called.get()
    attempt = called or _Attempt()
    context = FlowRunContext.get()
    own = None if context is None else context.flow_run
    attempt.run_id = None if own is None else own.id
    token = _called.set(None)
    try:
        # Prefect would ask the server for a slot of each tag before each task.
        with TagsContext(current_tags=set()), root_of_runs(_root_of(own)):
            attempt.result = body(*args, **kwargs)
    except Exception as error:
        attempt.error = error
    finally:
        _called.reset(token)
    attempt.has_ended = True
    if not _can_be_told() and called is not None:
        raise _Left("the server is away")
    if attempt.error is not None:
        raise attempt.error
    return cast(R, attempt.result)


def _root_of(own: FlowRun | None) -> FlowRun | None:
    if own is None or own.parent_task_run_id is None or root_run() is not None:
        return own
    # The flow of somebody else called ours.
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(runtime.flow_run.root_flow_run_id))


def _can_be_told() -> bool:
    """Tell whether the server is there to hear how the run ended; the last one of a process waits for it."""
    if is_phase():
        return server_answers()
    if not wait_for_server("to tell it how the run ended; Ctrl-C ends the waiting, all files are written"):
        courier().forget()
        forget_events()
        return False
    if not courier().is_empty_within(_LAST_MESSAGES_SECONDS):
        logger.warning(
            "%s is slow: it was not told all that happened before the end. All files are written",
            server_name(),
        )
    return True


def _not_there() -> TuneproofError:
    return TuneproofError(
        f"{server_name()} does not answer",
        "start that server, or unset PREFECT_API_URL to run without one (prefect config view)",
    )


def _keep_running_without_slot() -> None:
    """Let a run of a deployment go on when its slot of the deployment's limit cannot be renewed.

    Prefect would end it after an outage of minutes, or after a restart of a server that keeps its leases in memory.
    Two runs at once are the smaller harm: run folders and devices have locks of their own.
    """
    renewed = getattr(flow_engine, "maintain_concurrency_lease", None)
    if renewed is None:
        return

    @functools.wraps(renewed)
    def maintain(*args: Any, **kwargs: Any) -> Any:
        return renewed(*args, **{**kwargs, "raise_on_lease_renewal_failure": False})

    setattr(flow_engine, "maintain_concurrency_lease", maintain)  # noqa: B010


_keep_running_without_slot()
keep_events()
