"""Replies that were paid for once: an append-only file that a later evaluation, or one after a crash, reads."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import orjson

from tasks.core.files import flush_to_disk, storage_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model replied: its text, or `failure`, which says why there is none.

    A reply without text that is `lasting` was given by the model (it declined, or was cut) and would be
    given again; any other failure is worth another try in the next evaluation.
    """

    text: str = ""
    failure: str | None = None
    lasting: bool = True
    input_tokens: int = 0
    output_tokens: int = 0
    tokens_were_counted: bool = True
    retries: int = 0


_CUT = "its reply was cut at "


def cut_reason(max_tokens: int) -> str:
    """The failure of a reply that reached the limit; with another limit the prompt is asked again."""
    return f"{_CUT}{max_tokens} tokens (judge_max_tokens)"


class ReplyStore:
    """Replies by the digest of everything that shaped them; one JSON object a line, places in memory.

    A line is handed to the operating system as soon as its reply is there, so that the death of the process
    loses nothing that was paid. Several processes may append at once. Damaged lines are left out with a
    warning: what they held is asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._places = self._read_places()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, digest: str, cut: str | None = None) -> Reply | None:
        """The reply of that digest, if it is there; one that was cut, only if it would be cut again."""
        place = self._places.get(digest)
        if place is None:
            return None
        with self._lock:
            try:
                row = orjson.loads(os.pread(self._opened(), place[1], place[0]))
            except OSError as error:
                raise storage_error(error, self.path, "replies that came are kept") from error
        reply = Reply(
            row["text"], row["failure"], input_tokens=row["input_tokens"], output_tokens=row["output_tokens"]
        )
        was_cut = reply.failure is not None and reply.failure.startswith(_CUT)
        return None if was_cut and reply.failure != cut else reply

    def add(self, digest: str, reply: Reply) -> None:
        """Append a reply, unless another try may be worth it. Raises StorageError when it cannot be written."""
        if reply.failure is not None and not reply.lasting:
            return
        line = orjson.dumps(
            {
                "digest": digest,
                "text": reply.text,
                "failure": reply.failure,
                "input_tokens": reply.input_tokens,
                "output_tokens": reply.output_tokens,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        with self._lock:
            try:
                descriptor = self._opened()
                view = memoryview(line)
                while view:
                    view = view[os.write(descriptor, view) :]
                end = os.lseek(descriptor, 0, os.SEEK_CUR)
            except OSError as error:
                raise storage_error(error, self.path, "replies that came are kept") from error
            self._places[digest] = (end - len(line), len(line))

    def close(self) -> None:
        """Force everything to the disk and close; using the store opens it again."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
                flush_to_disk(self.path)

    def _opened(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Readable by its owner only: replies may quote what is private in questions and answers.
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a process died while writing
                os.write(descriptor, b"\n")
            self._descriptor = descriptor
        return self._descriptor

    def _read_places(self) -> dict[str, tuple[int, int]]:
        places: dict[str, tuple[int, int]] = {}
        damaged = offset = 0
        try:
            with self.path.open("rb") as file:
                for line in file:
                    try:
                        row = orjson.loads(line)
                        _ = row["text"], row["failure"], row["input_tokens"], row["output_tokens"]
                        places[row["digest"]] = (offset, len(line))
                    except (ValueError, KeyError, TypeError):
                        damaged += 1
                    offset += len(line)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, self.path, "replies that came are kept") from error
        if damaged:
            logger.warning(
                "%s: %d damaged lines are left out; what they held is asked again", self.path, damaged
            )
        return places
