"""Which markers a model puts around its thoughts: what its chat template writes, and what its tokenizer knows.

No list of models: an assistant's turn with thoughts is rendered, and what the template writes around them are the
markers. Where the template leaves thoughts out, or only cuts them off earlier turns, its source and the added
tokens are searched for texts of the shape of such markers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.core.prompts.thoughts import HARMONY, HARMONY_PLAIN, KNOWN_MARKERS, MarkerPair, ThoughtMarkers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Turn = dict[str, Any]
_Render = Callable[[Sequence[_Turn], bool], str | None]

_THOUGHTS, _ANSWER, _QUESTION = "qzthoughtszq", "qzanswerzq", "qzquestionzq"
# The keys under which templates look for an assistant's thoughts.
_TURNS: tuple[_Turn, ...] = (
    *({"content": _ANSWER, key: _THOUGHTS} for key in ("reasoning_content", "reasoning", "thinking")),
    {"content": [{"type": "thinking", "thinking": _THOUGHTS}, {"type": "text", "text": _ANSWER}]},
)
_WORD = r"(?:(?!start_|end_|begin_)[A-Za-z]+[:_])?(?:think(?:ing)?|thoughts?|reasoning)"
# Shapes of a pair; {} stands for the word.
_SHAPES = (
    ("<{}>", "</{}>"),
    ("[{}]", "[/{}]"),
    ("◁{}▷", "◁/{}▷"),
    ("<|{}|>", "<|/{}|>"),
    ("<|begin_of_{}|>", "<|end_of_{}|>"),
    ("<|start_of_{}|>", "<|end_of_{}|>"),
    ("<|start_{}|>", "<|end_{}|>"),
    ("<|begin_{}|>", "<|end_{}|>"),
    ("<|{}_start|>", "<|{}_end|>"),
    ("<|{}_begin|>", "<|{}_end|>"),
)
_TAG_AT_END = re.compile(r"(?:<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷)\Z")
_TAG_AT_START = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷")


def find_markers(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> ThoughtMarkers:
    """The markers that `tokenizer` and its chat template declare; none for a model that does not think.

    `template_kwargs` are what every rendering is given.
    """
    source = _template_source(tokenizer)
    rendered = None
    if source:

        def render(turns: Sequence[_Turn], add_generation_prompt: bool) -> str | None:
            return _rendered(tokenizer, turns, add_generation_prompt, template_kwargs or {})

        rendered = _by_rendering(render)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    shaped = ThoughtMarkers() | ThoughtMarkers(tuple(_by_shape(source or "", added)))
    return shaped if rendered is None else ThoughtMarkers((rendered,)) | shaped


def _template_source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # several named templates, none called default: whoever renders says so
        return None


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[_Turn],
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
) -> str | None:
    """The conversation as text, or None where the template refuses it."""
    from tasks.core.prompts.template_limits import limited_rendering

    try:
        with limited_rendering():
            text = tokenizer.apply_chat_template(
                list(turns), add_generation_prompt=add_generation_prompt, tokenize=False, **template_kwargs
            )
        return str(text)
    except Exception:  # whatever a template raises at a turn that it was not written for
        return None


# --- by rendering


def _by_rendering(render: _Render) -> MarkerPair | None:
    question = {"role": "user", "content": _QUESTION}
    for turn in _TURNS:
        full = render([question, {"role": "assistant", **turn}], False)
        if full is None:
            continue
        start = full.find(_THOUGHTS)
        end = full.find(_ANSWER, start + len(_THOUGHTS))
        if start < 0 or end < 0:
            continue
        opening = _opening(full[:start].rstrip(), render, question)
        closing, answer_opening = _closing_of(opening, full[start + len(_THOUGHTS) : end].strip())
        if opening and closing:
            if "<|channel|>" in opening:
                return HARMONY
            answer_closing = _first_tag(full[end + len(_ANSWER) :]) if answer_opening else ""
            return MarkerPair(opening, closing, answer_opening, answer_closing)
    return None


def _opening(before: str, render: _Render, question: _Turn) -> str:
    """The marker at the end of what stands before the thoughts."""
    tag = _TAG_AT_END.search(before)
    if tag is not None and _partner(tag.group()) is not None:
        return tag.group()
    prompt = render([question], True)
    behind = before[_shared_length(before, prompt) :] if prompt else ""
    return behind.strip() or (tag.group() if tag is not None else "")


def _shared_length(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _closing_of(opening: str, between: str) -> tuple[str, str]:
    """The closing marker, and what the template writes before the answer, from all that lies between."""
    partner = _partner(opening)
    if partner is not None and between.startswith(partner):
        return partner, between[len(partner) :].strip()
    return between, ""


def _first_tag(text: str) -> str:
    found = _TAG_AT_START.match(text.lstrip())
    return found.group() if found else ""


# --- by shape


def _by_shape(source: str, added_tokens: Sequence[str]) -> Iterator[MarkerPair]:
    """Pairs of which the template's source, or an added token, has one marker at least."""
    for text in (source, *added_tokens):
        for pair in KNOWN_MARKERS.pairs:
            if pair != HARMONY_PLAIN and (pair.opening in text or pair.closing in text):
                yield pair
        for shape in _SHAPES:
            for marker in shape:
                for found in _pattern_of(marker).finditer(text):
                    yield _pair(shape, marker, found)


def _partner(opening: str) -> str | None:
    """The closing marker of an opening one that has a known shape."""
    for shape in _SHAPES:
        found = _pattern_of(shape[0]).fullmatch(opening)
        if found:
            return _pair(shape, shape[0], found).closing
    return None


def _pair(shape: tuple[str, str], marker: str, found: re.Match[str]) -> MarkerPair:
    """The pair of one shape to which the marker that was found belongs, in its own letter case."""
    whole, word = found.group(), found.group(1)
    opening, closing = (text.replace("{}", word) for text in shape)
    if whole != marker.replace("{}", word):
        opening, closing = opening.upper(), closing.upper()
    return MarkerPair(opening, closing)


@cache
def _pattern_of(marker: str) -> re.Pattern[str]:
    return re.compile(re.escape(marker).replace(r"\{\}", f"({_WORD})"), re.IGNORECASE)
