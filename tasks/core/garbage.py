"""Python's search for reference cycles, kept from where it finds nothing and takes seconds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(*, frozen: bool = False) -> Iterator[None]:
    """Look for no cycles inside the block; `frozen`: nor later among all that is there at its end.

    For imports, which make half a million objects that stay as long as the process: a third of their time is such
    searches, and each later one walks all of them again. Frozen is only what one command's own process has loaded
    before its work: garbage among it would never be freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if frozen:
            gc.freeze()
        if was_enabled:
            gc.enable()
