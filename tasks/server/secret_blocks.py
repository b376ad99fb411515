"""Keys that are kept in Prefect Secret blocks."""

from __future__ import annotations

from typing import cast

from prefect.blocks.system import Secret
from pydantic import SecretStr

from tasks.core.config import EvaluatorConfig
from tasks.core.errors import EvaluationError
from tasks.server.telling import server_name, wait_for_server

_BLOCK = "secret:"


def judge_key_of(settings: EvaluatorConfig) -> SecretStr | None:
    """The key that judge_api_key names, when a metric needs a model and the key is in a Secret block.

    Raises EvaluationError when there is no such block.
    """
    name = settings.judge_api_key.removeprefix(_BLOCK)
    if name == settings.judge_api_key or not settings.uses_an_endpoint:
        return None
    if not wait_for_server(f"for the Secret block {name}"):
        raise EvaluationError(
            f"judge_api_key names the Prefect Secret block {name!r}, and {server_name()} does not answer",
            "start that server, or set another place of the key, such as env:NAME",
        )
    try:
        block = Secret.load(name, _sync=True)  # type: ignore[call-arg]  # Prefect's own wrapper takes it
        value = cast(Secret[str], block).get()
    except ValueError as error:
        raise EvaluationError(
            f"judge_api_key names the Prefect Secret block {name!r}, which does not exist",
            f"create it: prefect block create secret, with the name {name}; or set another place of the key",
        ) from error
    return SecretStr(str(value))
