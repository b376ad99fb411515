"""After the verdict: promote, ask a person, or leave everything as it is."""

from __future__ import annotations

import logging
from typing import Literal

from prefect import pause_flow_run
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout, ObjectNotFound
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Running
from pydantic import Field

from tasks.core.config import Config
from tasks.core.evaluation.summary import EvaluationSummary
from tasks.core.promotion.promotable import this_user
from tasks.core.promotion.promotion import Promotion
from tasks.core.report.html_page import duration
from tasks.core.storage.store import Store
from tasks.promoter import Promoter
from tasks.promotion import promote_model
from tasks.server.events import emit_model_promoted
from tasks.server.lasting_server import has_lasting_server
from tasks.server.telling import server_name, wait_for_server
from tasks.ui.artifacts import scores_markdown

logger = logging.getLogger("tasks.promotion")

_POLL_SECONDS = 10
# With pauses that double: a server may be away for eight minutes while a person is asked.
_TRIES = 8


class PersonsDecision(RunInput):
    """The form that the Prefect UI shows when a verdict is inconclusive."""

    decision: Literal["promote", "do not promote"] = Field(
        "do not promote", description="What becomes of the candidate."
    )
    reason: str = Field(min_length=3, description="Why; it is kept in the history of promotions.")


def promote_if_decided(config: Config, summary: EvaluationSummary) -> Promotion | None:
    """Do what [pipeline] promote says after this verdict; None when nothing is promoted."""
    verdict, mode = summary.verdict, config.pipeline.promote
    if mode == "never" or verdict is None:
        return None
    decision = f"flow run {flow_run.id}"  # its name may change
    promoter = Promoter(config, by=f"{this_user()}, {decision}")
    if promoter.is_promoted(summary):
        logger.info("the model of %s is the promoted one already", summary.candidate.run_name)
        return None
    if flow_run.id and promoter.has_promoted(summary, decision):
        logger.warning(
            "this flow run promoted the model of %s, which was taken back", summary.candidate.run_name
        )
        return None
    if verdict.decision == "promote":
        return promote_model(promoter, summary)
    if verdict.decision == "inconclusive" and mode == "ask":
        answer = ask_a_person(summary, config.pipeline.ask_timeout_seconds)
        if answer is not None and answer.decision == "promote":
            return promote_model(promoter, summary, reason=answer.reason)
        if answer is not None:
            logger.info("a person decided not to promote: %s", answer.reason)
    return None


def announce(config: Config, promotion: Promotion) -> None:
    """Emit the event of a promotion or rollback by hand, if there is a server to take it."""
    if has_lasting_server():
        models = Store(config.pipeline.models_dir)
        emit_model_promoted(models.url_of(models.local / promotion.run_name), promotion)


def ask_a_person(summary: EvaluationSummary, timeout_seconds: int) -> PersonsDecision | None:
    """Pause the flow run until a person has filled in the form; None when nobody does in time.

    The verdict then stays inconclusive, and the run goes on to its end.
    """
    if not has_lasting_server():
        logger.warning("nobody can be asked: PREFECT_API_URL names no Prefect server. It stays inconclusive")
        return None
    if not wait_for_server("to ask a person"):
        logger.warning("nobody can be asked: %s does not answer. It stays inconclusive", server_name())
        return None
    form = PersonsDecision.with_initial_data(description=_question(summary))
    logger.info(
        "inconclusive: waiting up to %s for a decision in the Prefect UI (Resume)",
        duration(timeout_seconds),
    )
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: _TRIES}):
            return pause_flow_run(
                wait_for_input=form,
                timeout=timeout_seconds,
                poll_interval=min(_POLL_SECONDS, max(1, timeout_seconds // 10)),
            )
    except FlowPauseTimeout:
        logger.warning("nobody decided within %s: it stays inconclusive", duration(timeout_seconds))
    except ObjectNotFound:
        logger.warning("the run was resumed without a decision: it stays inconclusive")
        return None
    _go_on()
    return None


def _go_on() -> None:
    """Take the run out of its pause; a run that is still paused could not end as completed."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Running(), force=True)


def _question(summary: EvaluationSummary) -> str:
    verdict = summary.verdict
    reasons = () if verdict is None else (f"- {reason}" for reason in verdict.reasons)
    return "\n".join(["# Promote this model?", "", *reasons, "", scores_markdown(summary)])
