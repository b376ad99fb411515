"""Messages of the core, which knows no Prefect, shown in the logs of the run that they belong to."""

from __future__ import annotations

import logging
import os

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from tasks.core.errors import TuneproofError
from tasks.core.escaping import escape_record

CORE_LOGGER = "tasks"
FLOW_RUN_LOGGER = "prefect.flow_runs"

# Libraries that draw bars or chat; each reads its variable when it is imported, which is later.
_QUIET_LIBRARIES = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def send_core_logs_to_prefect() -> None:
    """Send what the core logs to the run's logs too, and keep libraries quiet. Calling it again does nothing."""
    for variable, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(variable, value)
    core = logging.getLogger(CORE_LOGGER)
    if core.level == logging.NOTSET:
        core.setLevel(logging.INFO)
    if any(isinstance(handler, APILogHandler) for handler in core.handlers):
        return
    logging.getLogger(FLOW_RUN_LOGGER).addFilter(_tell_own_errors_without_traceback)
    handler = APILogHandler()
    handler.addFilter(_belongs_to_a_run)
    handler.addFilter(escape_record)
    for name in (None, "prefect"):  # where a worker shows what its runs log
        for shown in logging.getLogger(name).handlers:
            shown.addFilter(escape_record)
    core.addHandler(handler)


def _belongs_to_a_run(record: logging.LogRecord) -> bool:
    """Library use outside of a flow, and threads of its own, have no run to log to."""
    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def _tell_own_errors_without_traceback(record: logging.LogRecord) -> bool:
    """An error of ours says what to do in its message; a traceback is for bugs."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if isinstance(error, TuneproofError):
        record.msg, record.args, record.exc_info = str(error), (), None
    return escape_record(record)
