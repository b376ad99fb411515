"""Whether the Prefect server in use is one that lasts, or the temporary one of a single command."""

from __future__ import annotations

import os

from prefect.settings import PREFECT_API_URL

TEMPORARY_ADDRESS = "TEMPORARY_PREFECT_SERVER"
"""Environment variable with the address of the temporary server; its command sets it, child processes inherit it."""


def has_lasting_server() -> bool:
    """Tell whether there is a server on which others see this run, and which is there when it has ended."""
    return bool(PREFECT_API_URL.value()) and not is_temporary_server()


def is_temporary_server() -> bool:
    """Tell whether the server in use is that of one command, which ends with it."""
    address: str | None = PREFECT_API_URL.value()
    return address is not None and address == os.environ.get(TEMPORARY_ADDRESS)
