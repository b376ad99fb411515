"""Children of `multiprocessing` that begin with the libraries loaded, where the code under test spawns them.

They come from Python's fork server, which has only imported them. Unlike spawned ones they hear every signal that the
test process has told its children not to hear.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from typing import Any

import pytest


class _Environment:
    """The environment of the moment in which a child is begun; it is there before anything else is unpickled."""

    def __reduce__(self) -> tuple[Callable[[dict[str, str]], None], tuple[dict[str, str]]]:
        return _set_environment, (dict(os.environ),)


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _begin(_: None, target: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    target(*args, **kwargs)


class _WarmProcess(ForkServerProcess):
    def __init__(
        self,
        group: None = None,
        target: Any = None,
        name: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        wrapped = (_Environment(), target, tuple(args), dict(kwargs or {}))
        super().__init__(group, _begin, name, wrapped, daemon=daemon)


class _WarmContext(ForkServerContext):
    Process = _WarmProcess


@pytest.fixture
def warm_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `multiprocessing.get_context("spawn")` begin children that have the libraries loaded."""
    warm = _WarmContext()
    warm.set_forkserver_preload(["tests.making.warm.libraries"])
    plain: Callable[..., BaseContext] = multiprocessing.get_context
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda method=None: warm if method == "spawn" else plain(method)
    )
