"""All parts and their shares of the time. They run in one process, which has loaded the libraries once."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from bench.checks.rows import Bench, Check, Row

# In the order in which they run. Secrets and servers take what they take.
SHARES = {
    "kills": 0.20, "calls": 0.24, "disks": 0.08, "damage": 0.16, "crowds": 0.06, "clocks": 0.06, "corpus": 0.08,
    "buckets": 0.04, "leaks": 0.0, "soak": 0.06, "servers": 0.0,
}  # fmt: skip
HIDDEN = ("broken",)
_LIMIT_SECONDS = 420.0
_ABOUT_SECONDS = 1.0


def _named(part: str) -> Check:
    def run(bench: Bench) -> Iterator[Row]:
        return importlib.import_module(f"bench.torture_parts.{part}").check(bench, SHARES.get(part, 0.0))  # type: ignore[no-any-return]

    return Check(part, run, _ABOUT_SECONDS, _LIMIT_SECONDS)


CHECKS = tuple(map(_named, (*SHARES, *HIDDEN)))
