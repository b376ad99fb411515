"""`tuneproof down`: the end of what `up` started."""

from __future__ import annotations


def down() -> None:
    """End what `up` started; answers, models and the server's database stay."""
    from flows.server.serving import down as end

    end()
