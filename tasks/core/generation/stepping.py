"""Where an engine's steps run: in the calling thread, until oneDNN is of no more use there.

The assembler inside oneDNN (Xbyak) keeps the error of a failed allocation in a thread-local variable and does not
clear it: from then on no new operation can be prepared in that thread, however much memory is free. Other threads
are not affected, so the next attempt gets one of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Self, TypeVar

ONEDNN_FAILURE = "could not create a primitive"

T = TypeVar("T")
_of_thread = threading.local()


class StepThread:
    """Calls functions here or, after oneDNN has failed, in another thread; a context manager."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        if getattr(_of_thread, "onednn_failed", False):
            self._renew()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    def call(self, function: Callable[[], T]) -> T:
        """Return function(), whose errors pass through."""
        if self._executor is None:
            return function()
        return self._executor.submit(copy_context().run, function).result()

    def replace_after(self, message: str) -> None:
        """Leave the thread behind when `message` is one after which oneDNN cannot be used in it."""
        if ONEDNN_FAILURE not in message:
            return
        if self._executor is None:
            _of_thread.onednn_failed = True
        self._renew()

    def _renew(self) -> None:
        self._end()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="generation")

    def _end(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
