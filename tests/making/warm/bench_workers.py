"""Workers of a bench that the test process runs begin with the libraries loaded."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from bench.checks import running
from tests.making.warm.python import WarmPython


@contextmanager
def warm_workers() -> Iterator[None]:
    """Let `run_checks` start warm workers; what a bench sets for its own process is put back."""
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "subprocess", SimpleNamespace(Popen=_start, DEVNULL=subprocess.DEVNULL))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler)
            os.environ.clear()
            os.environ.update(environment)


def _start(command: list[str], *, cwd: Path, env: dict[str, str], stdout: IO[bytes], **_: Any) -> WarmPython:
    with Path(os.devnull).open() as nothing:
        streams = (nothing.fileno(), stdout.fileno(), stdout.fileno())
        # Torture forks its commands itself, and traces them.
        begins_more = any(word.startswith("bench.gpu_parts.") for word in command)
        return WarmPython(
            command[1:], env=env, cwd=cwd, streams=streams, new_session=True, warm_children=begins_more
        )
