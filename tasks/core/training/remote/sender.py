"""Sends checkpoints while a training writes them; the training waits for nothing of it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set

from tasks.core.errors import StorageError
from tasks.core.training import checkpoints
from tasks.core.training.remote.checkpoints import RemoteCheckpoints, best_of

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
LAST_SECONDS = 5.0
"""What a training that ends early waits for its last checkpoint; a command that was interrupted has seconds."""


class CheckpointSender:
    """Sends checkpoints from a thread of its own; `end` leaves what is on its way to it."""

    def __init__(self, own: RemoteCheckpoints, keep: int) -> None:
        self._own, self._keep = own, keep
        self._over, self._is_last = threading.Event(), False
        self._done: tuple[str, bytes] | None = None
        self._thread = threading.Thread(target=self._repeat, name="checkpoint-sender", daemon=True)

    def start(self) -> None:
        """Begin to look for whole checkpoints."""
        self._thread.start()

    def end(self, last_seconds: float | None) -> None:
        """End after what is being sent; with `last_seconds` the newest is sent too, as far as that time allows."""
        self._is_last = last_seconds is not None
        self._over.set()
        self._thread.join(last_seconds or LAST_SECONDS)
        newest = next(iter(reversed(checkpoints.all_whole(self._own.here))), None)
        if last_seconds is not None and newest is not None and self._done != _mark_of(newest):
            logger.warning(
                "%s stays on this machine: it could not be sent; another one goes on from %s",
                *(newest, "the beginning" if self._done is None else self._done[0]),
            )

    def _repeat(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            retrying = Retrying(
                retry=retry_if_exception_type(StorageError),
                wait=wait_exponential(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS),
                stop=stop_when_event_set(self._over),
                sleep=sleep_using_event(self._over),
                before_sleep=_tell,
                reraise=True,
            )
            try:
                retrying(self._send_newest)
            except StorageError:  # the training has ended
                break
            except Exception as error:  # it goes on whatever happens here
                logger.warning("a checkpoint cannot be sent: %s", error)
        if self._is_last:
            try:
                self._send_newest()
            except Exception as error:
                logger.warning("the last checkpoint could not be sent: %s", error)

    def _send_newest(self) -> None:
        newest = next(iter(reversed(checkpoints.all_whole(self._own.here))), None)
        if newest is None or (mark := _mark_of(newest)) is None or mark == self._done:
            return
        try:
            best = best_of(newest)
        except (OSError, ValueError, KeyError):
            return  # it was removed meanwhile
        if best is not None and not self._own.send(self._own.here / best):
            return
        if self._own.send(newest):
            self._done = mark
            self._own.rotate(newest.name, self._keep, best)


def _mark_of(checkpoint_dir: Path) -> tuple[str, bytes] | None:
    try:
        return checkpoint_dir.name, (checkpoint_dir / checkpoints.SEAL_NAME).read_bytes()
    except OSError:
        return None


def _tell(state: RetryCallState) -> None:
    error = state.outcome and state.outcome.exception()
    what = error.what if isinstance(error, StorageError) else error
    logger.warning("a checkpoint could not be sent, it is tried again; the training goes on: %s", what)
