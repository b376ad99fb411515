"""One answer, piece by piece as it is generated; thoughts are not part of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tasks.core.errors import DataError
from tasks.core.generation.batching import Request
from tasks.core.generation.engines.sorted_batches import SortedBatchEngine
from tasks.core.prompts.answer_reading import AnswerGate
from tasks.core.records import Example, GenerationSettings, Message, Prompt

if TYPE_CHECKING:
    import torch

    from tasks.core.models.loading import LoadedModel

logger = logging.getLogger(__name__)


def example_of(asked: str | Iterable[Message], system: str | None) -> Example:
    """Return a question, or a conversation that ends with one, as a row; `system` is for a single question."""
    if isinstance(asked, str):
        return Example("stream-0", asked, system)
    messages = tuple(asked)
    return Example("stream-0", messages[-1].content if messages else "", messages=messages)


def stream_answer(model: LoadedModel, prompt: Prompt, settings: GenerationSettings) -> Iterator[str]:
    """Yield pieces of text that joined are the answer; generation runs in a thread of its own.

    Nothing is yielded while the model thinks; when its thoughts never end, a warning says so. The first error of
    that thread is raised here. Closing the iterator early stops generation. Raises DataError when the prompt
    cannot be asked.
    """
    if prompt.problem is not None:
        raise DataError(
            f"the prompt cannot be answered: {prompt.problem}", "shorten it or change its settings"
        )
    if prompt.truncated_tokens:
        logger.warning(
            "the question was cut on the left by %d tokens: with the answer it is longer than the model or "
            "max_sequence_length allows",
            prompt.truncated_tokens,
        )
    gate = AnswerGate(model.tokenizer, settings.thought_markers, prompt.token_ids)
    streamer = _AnswerStreamer(model, gate)
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
        yield from _without_stop_strings(_from_its_beginning(iter(streamer), gate), settings.stop_strings)
    finally:
        cancelled.set()
        thread.join()
    if failure:
        raise failure[0]
    if gate.is_thinking:
        logger.warning(
            "the model was cut in its thoughts after %d tokens, so there is no answer: raise max_new_tokens",
            gate.token_count,
        )


class _AnswerStreamer:
    """A streamer for transformers' `generate` that lets tokens through once they are the answer's."""

    def __init__(self, model: LoadedModel, gate: AnswerGate) -> None:
        from transformers import TextIteratorStreamer

        self._streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._gate = gate
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token after the other."""
        if self._is_prompt:
            self._is_prompt = False
            self._streamer.put(value)
        else:
            self._pass_on(self._gate.pass_on([int(token_id) for token_id in value.reshape(-1).tolist()]))

    def end(self) -> None:
        """Let through what is left, and end."""
        self._pass_on(self._gate.end())
        self._streamer.end()

    def __iter__(self) -> Iterator[str]:
        return iter(self._streamer)

    def _pass_on(self, token_ids: Sequence[int]) -> None:
        import torch

        if token_ids:
            self._streamer.put(torch.tensor(list(token_ids)))


def _from_its_beginning(pieces: Iterator[str], gate: AnswerGate) -> Iterator[str]:
    """Drop the white space between thoughts and answer."""
    begun = False
    for piece in pieces:
        if not begun and gate.first_piece:
            begun = True
            yield gate.first_piece
        text = piece if begun or not gate.has_thought else piece.lstrip()
        if text:
            begun = True
            yield text


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
