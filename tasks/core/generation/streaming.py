"""One answer, piece by piece as it is generated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tasks.core.errors import DataError
from tasks.core.generation.batching import Request
from tasks.core.generation.sorted_batches import SortedBatchEngine
from tasks.core.records import GenerationSettings, Prompt

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel


def stream_answer(model: LoadedModel, prompt: Prompt, settings: GenerationSettings) -> Iterator[str]:
    """Yield pieces of text that joined are the answer; generation runs in a thread of its own.

    The first error of that thread is raised here. Closing the iterator early stops generation.
    Raises DataError when the prompt cannot be asked.
    """
    if prompt.problem is not None:
        raise DataError(
            f"the prompt cannot be answered: {prompt.problem}", "shorten it or change its settings"
        )
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    engine = SortedBatchEngine(model, settings)
    request = Request(0, prompt.id, prompt.token_ids, settings.max_new_tokens)
    failure: list[BaseException] = []
    cancelled = threading.Event()

    def work() -> None:
        try:
            engine.stream(request, streamer, cancelled)
        except BaseException as exc:  # handed to the consumer, who raises it
            failure.append(exc)
        finally:
            streamer.end()

    thread = threading.Thread(target=work, name="tuneproof-stream", daemon=True)
    thread.start()
    try:
        yield from _without_stop_strings(streamer, settings.stop_strings)
    finally:
        cancelled.set()
        thread.join()
    if failure:
        raise failure[0]


def _without_stop_strings(pieces: Iterator[str], stop_strings: tuple[str, ...]) -> Iterator[str]:
    """Hold back what could be the beginning of a stop string; end before the first one."""
    if not stop_strings:
        yield from (piece for piece in pieces if piece)
        return
    longest = max(map(len, stop_strings))
    held = ""
    for piece in pieces:
        held += piece
        places = [place for text in stop_strings if (place := held.find(text)) >= 0]
        if places:
            yield held[: min(places)]
            return
        safe = len(held) - longest + 1
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held
