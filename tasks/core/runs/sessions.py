"""Sessions: the stretches of work on a run, written down while they last, so that a killed one is told of too."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from tasks.core.errors import StorageError
from tasks.core.files import flush_to_disk, storage_error
from tasks.core.records import MemoryEvent, Record
from tasks.core.runs.ledger import ROWS_KEPT, count_lines
from tasks.core.runs.run_dir import RunDir

logger = logging.getLogger(__name__)

# At first so often, then less: a session that is killed loses a twentieth of its time at most.
_FIRST_BEAT_SECONDS = 0.25
_BEAT_SHARE = 0.05
_LONGEST_SECONDS = 1e10
_told: set[tuple[Path, int, bytes]] = set()


class Session(Record):
    """One stretch of work on a run; a run that was interrupted has several.

    A session writes a line when it begins, further ones while it lasts, and one when it ends, with the same
    `session_id`: the last one counts. Older versions wrote one line without an id at the end.
    """

    engine: str
    engine_reason: str | None = None
    shard: str | None = Field(None, pattern=r"^\d{1,9}-of-\d{1,9}$")
    host: str | None = None
    started_at: str
    seconds: float = Field(ge=0, le=_LONGEST_SECONDS, allow_inf_nan=False)
    rows: int = Field(ge=0)
    memory_events: tuple[MemoryEvent, ...] = ()
    peak_memory_bytes: int | None = None
    limit_tokens: int = 0
    device: str = "cpu"
    session_id: str | None = None
    rows_before: int | None = Field(
        None, ge=0, description="lines that the ledger of its part had when it began"
    )
    is_over: bool = Field(
        True, description="false while it lasts, and in the last line of one that was killed"
    )

    @field_validator("started_at")
    @classmethod
    def _is_a_moment(cls, value: str) -> str:
        datetime.fromisoformat(value)
        return value

    @property
    def started(self) -> datetime:
        """When it began; a time without a zone is taken as UTC."""
        moment = datetime.fromisoformat(self.started_at)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@contextmanager
def recorded(part: RunDir, describe: Callable[[], Session]) -> Iterator[None]:
    """Write down the session that the block is: at its begin, while it lasts, and at its end.

    `describe` tells how far it is, from any thread. Raises StorageError when begin or end cannot be written;
    trouble in between is left to the end.
    """
    name = {"session_id": secrets.token_hex(6)}
    over = threading.Event()

    def write(*, is_over: bool) -> float:
        session = describe().model_copy(update={**name, "is_over": is_over})
        append_session(part, session)
        return session.seconds

    def beat() -> None:
        pause = _FIRST_BEAT_SECONDS
        while not over.wait(pause):
            try:
                pause = max(_FIRST_BEAT_SECONDS, _BEAT_SHARE * write(is_over=False))
            except Exception as exc:  # what only tells of the work must not end it
                logger.debug("the session could not be written down: %s", exc)

    write(is_over=False)
    thread = threading.Thread(target=beat, name="session-beat", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        over.set()
        thread.join()
        try:
            write(is_over=True)
        except StorageError as exc:
            logger.warning("%s", exc.what)
        raise
    over.set()
    thread.join()
    write(is_over=True)
    flush_to_disk(part.sessions_path)


def append_session(part: RunDir, session: Session) -> None:
    """Add a line to sessions.jsonl, on a line of its own after a torn one too. Raises StorageError."""
    try:
        with part.sessions_path.open("ab+") as file:
            line = session.model_dump_json().encode() + b"\n"
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
    except OSError as exc:
        raise storage_error(exc, part.sessions_path, ROWS_KEPT) from exc


def read_sessions(part: RunDir) -> list[Session]:
    """All sessions of a run or shard in the order in which they began, each as its last line tells it.

    Lines that are torn or damaged are left out; which ones is logged.
    """
    try:
        lines = part.sessions_path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    sessions: dict[str, Session] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            session = Session.model_validate_json(line)
        except ValidationError:
            if (part.sessions_path, number, line) not in _told:
                _told.add((part.sessions_path, number, line))
                logger.warning(
                    "%s: line %d is damaged; what it told of times and memory is left out",
                    *(part.sessions_path, number),
                )
            continue
        sessions[session.session_id or f"line {number}"] = session
    return list(sessions.values())


def settled_sessions(part: RunDir) -> list[Session]:
    """Sessions as `read_sessions` gives them, with all rows of those that were killed.

    What a killed one answered after its last line is in the ledger: all that came until the next one began.
    """
    sessions = read_sessions(part)
    begins = [session.rows_before for session in sessions] + [None]
    following: int | None = None
    settled: list[Session] = []
    for place in range(len(sessions) - 1, -1, -1):
        session, begin = sessions[place], begins[place]
        if not session.is_over and begin is not None:
            following = count_lines(part.ledger_path) if following is None else following
            session = session.model_copy(update={"rows": max(session.rows, following - begin)})
        following = following if begin is None else begin
        settled.insert(0, session)
    return settled


def count_out_of_memory(parts: Iterable[RunDir]) -> int:
    """How often memory ran out in all sessions, as far as they told."""
    sessions = (session for part in parts for session in read_sessions(part))
    return sum(event.ran_out for session in sessions for event in session.memory_events)
