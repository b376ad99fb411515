"""Recognising secrets, so that they are neither read from settings nor shown in a message."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"^hf_[A-Za-z0-9]{8,}$|hf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
)
# What an address may carry: a password before the host, anything after the path.
_IN_ADDRESS = re.compile(r"(https?://)[^/\s@\"]+(?=@)|(https?://[^\s?#\"]*[?#])[^\s\"]+")
_SECRET_KEY = re.compile(r"(^|_)(key|token|secret|password)$")


def looks_like_token(text: str) -> bool:
    """Tell whether a text is or holds an access token of the Hub, OpenAI or GitHub."""
    return _TOKEN.search(text) is not None


def names_a_secret(key: str) -> bool:
    """Tell whether a key is called like a secret, e.g. hf_key or openai_api_key."""
    return _SECRET_KEY.search(key.lower()) is not None


def secret_variable(key_or_value: str) -> str:
    """Name the environment variable where this secret belongs."""
    lowered = key_or_value.lower()
    if "openai" in lowered or "sk-" in lowered:
        return "OPENAI_API_KEY"
    if "wandb" in lowered:
        return "WANDB_API_KEY"
    return "HF_TOKEN"


def hide_secrets(text: str) -> str:
    """Replace what looks like a token, and what an address carries besides host and path."""
    return _IN_ADDRESS.sub(lambda found: f"{found[1] or found[2]}(hidden)", _TOKEN.sub("(hidden)", text))
