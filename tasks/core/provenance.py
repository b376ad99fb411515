"""What stands in every manifest: the moment, and the versions of the libraries that made the result."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def now(timespec: str = "seconds") -> str:
    """Return the time as ISO 8601 in UTC, to the second unless another `timespec` is asked for."""
    return datetime.now(UTC).isoformat(timespec=timespec)


@cache
def library_version(distribution: str) -> str:
    """Return the installed version of a distribution, in words where there is none.

    Asked of the installation once a process, whose libraries do not change under it; it takes milliseconds.
    """
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def library_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution."""
    return {name: library_version(name) for name in distributions}
