"""`tuneproof ask`: one question, answered as it is generated."""

from __future__ import annotations

from flows.cli.options import Common, ConfigPath, HubKey, Settings
from flows.cli.starting import prepare
from tasks.core.errors import ConfigError
from tasks.core.escaping import visible


def ask(
    question: str, config: ConfigPath = None, /, *, hf_key: HubKey = None, settings: Settings = None
) -> None:
    """Ask the fine-tuned model one question; the answer appears as it is generated."""
    if not question.strip():
        raise ConfigError(
            "the question is empty", 'write it in quotes: tuneproof ask "How many legs has a dog?"'
        )
    loaded = prepare(config, Common(hf_key), settings)
    from tasks.inferencer import Inferencer

    for piece in Inferencer(loaded).stream_inference(question):
        print(visible(piece), end="", flush=True)
    print()
