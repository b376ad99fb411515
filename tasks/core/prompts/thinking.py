"""Templates of models that think: how a prompt asks for an answer without thoughts, and how thoughts are written.

A model that learns answers behind an empty thought block must not learn to write that block: it belongs to the
prompt, in training and ever after. `closed` gives the template that asks in this way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from tasks.core.errors import TemplateError
from tasks.core.prompts.chat_template import ChatTemplate, with_defaults, with_generation_prompt
from tasks.core.prompts.thought_markers import find_markers
from tasks.core.prompts.thoughts import MarkerPair, ThoughtMarkers, open_pair

_SWITCH = re.compile(r"(?<![\w.'\"])(\w*(?:think|reason)\w*)(?![\w'\"])", re.IGNORECASE)
_OFF = (False, True)  # the second for a variable that says the opposite, such as no_thinking


@dataclass(frozen=True)
class Thinking:
    """What a chat template does with thoughts. `template` is the template as it is."""

    template: ChatTemplate

    @cached_property
    def markers(self) -> ThoughtMarkers:
        """The markers that the template itself writes or knows of; what only the tokenizer knows is not among them."""
        source = self.template.source
        found = find_markers(self.template.tokenizer, self.template.variables).pairs
        rendered = found[:1] if self.template.thought_key is not None else ()
        return ThoughtMarkers(tuple(pair for pair in found if pair.closing in source or pair in rendered))

    @cached_property
    def is_open(self) -> bool:
        """Whether a prompt ends inside thoughts, so that whatever follows it is one."""
        return open_pair(self.template.generation_prompt, self.markers) is not None

    @cached_property
    def is_closed(self) -> bool:
        """Whether a prompt ends with thoughts that are over: what follows is the answer."""
        end = self.template.generation_prompt.rstrip()
        return any(
            end.endswith((pair.closing, pair.answer_opening or pair.closing)) for pair in self.markers.pairs
        )

    @cached_property
    def closed(self) -> ChatTemplate:
        """The template that asks for an answer without thoughts; the same one where nothing need be changed.

        The switch that the template itself knows is turned off (`enable_thinking`, found among its variables and
        tried); without one, what it writes before an answer without thoughts is put behind the prompt.
        """
        if self.is_closed:
            return self.template
        return self._switched_off() or self._with_end() or self.template

    @property
    def may_think(self) -> bool:
        """Whether the prompt leaves it to the model to think, and another one would not."""
        return self.closed is not self.template

    @property
    def simple_pair(self) -> MarkerPair | None:
        """The markers to write thoughts with, where the template takes them only as text or not at all."""
        opened = open_pair(self.template.generation_prompt, self.markers)
        simple = (
            pair
            for pair in self.markers.pairs
            if pair.opening and not pair.answer_opening and "<|channel|>" not in pair.closing
        )
        return opened or next(simple, None)

    @property
    def in_words(self) -> str | None:
        """What a prompt does with thoughts, for a log; None for a template that knows none."""
        if self.is_closed:
            return "the prompt asks for answers without thoughts"
        if self.is_open:
            return "the prompt begins the model's thoughts"
        if self.may_think or self.markers:
            return "the prompt lets the model think"
        return None

    def _switched_off(self) -> ChatTemplate | None:
        names = dict.fromkeys(_SWITCH.findall(self.template.source))
        for name in names:
            if name in self.template.variables:
                continue  # somebody has set it, so it stays as it is
            for value in _OFF:
                off = self._tried(with_defaults(self.template.source, {name: value}))
                if off is not None and Thinking(off).is_closed and not (off.answer_opening or "").strip():
                    return off
        return None

    def _with_end(self) -> ChatTemplate | None:
        """Behind the prompt, what a finished answer has there, or the end of the thoughts that it opens."""
        opening = self.template.answer_opening
        if opening is None or not opening.strip():
            pair = open_pair(self.template.generation_prompt, self.markers)
            if pair is None:
                return None
            line = "\n" if self.template.generation_prompt.endswith("\n") else ""
            opening = f"{line}{pair.closing}\n\n"
        return self._tried(with_generation_prompt(self.template.source, opening))

    def _tried(self, source: str) -> ChatTemplate | None:
        try:
            return self.template.with_source(source)
        except TemplateError:
            return None


def written_with(pair: MarkerPair, thoughts: str, answer: str) -> str:
    """Thoughts and answer as the models write them whose markers these are."""
    return f"{pair.opening}\n{thoughts.strip()}\n{pair.closing}\n\n{answer.lstrip()}"
