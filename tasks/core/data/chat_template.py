"""A tokenizer's chat template: conversation -> text, and the fingerprint of how it does that."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.errors import TemplateError
from tasks.core.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ 'System: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] }}{{ eos_token }}{{ '\\n\\n' }}"
    "{% else %}{{ 'Context: ' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
# Some templates print today's date. The same rows must give the same prompts tomorrow, so the day is
# fixed: to the one that Llama 3's own template takes when it is not told the date.
_FIXED_DATE = "26 Jul 2024"
_FIXED_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{{ format.replace('%Y', '2024').replace('%y', '24').replace('%B', 'July').replace('%b', 'Jul')"
    ".replace('%m', '07').replace('%d', '26').replace('%A', 'Friday').replace('%a', 'Fri')"
    ".replace('%H', '12').replace('%I', '12').replace('%M', '00').replace('%S', '00').replace('%p', 'PM') }}"
    "{%- endmacro -%}"
)
# What a user's text must not be able to forge; system prompts and answers may hold such tokens on purpose.
_UNTRUSTED_ROLES = ("user", "tool")
_PROBE_SYSTEM, _PROBE_USER = "qzsystemzq", "qzuserzq"


class Rendered(NamedTuple):
    """A conversation as text. `is_marked`: control tokens in a user's text wear transformers' private markers."""

    text: str
    is_marked: bool


class ChatTemplate:
    """How one tokenizer writes conversations.

    Without a template of its own a plain one is used; where the template takes no system message, its
    text is put before the first user message. Raises TemplateError when even one question cannot be rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        own = _own_template(tokenizer)
        self.is_plain = own is None
        self._source = PLAIN_TEMPLATE if own is None else own
        self._text = _FIXED_CLOCK + self._source if "strftime_now" in self._source else self._source
        self.folds_system = False
        self._check_and_probe()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        """The conversation as text; raises TemplateError with the template's own words."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        if self.folds_system:
            messages = _folded(messages)
        is_marked = False
        turns: list[dict[str, str]] = []
        for message in messages:
            content = message.content
            if message.role in _UNTRUSTED_ROLES and self.control_tokens.search(content):
                content, is_marked = mark_control_tokens(content, self.control_tokens), True
            turns.append({"role": message.role, "content": content})
        return Rendered(self._apply(turns, add_generation_prompt), is_marked)

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Matches the special tokens, and the other added tokens that the template writes itself."""
        added = self._tokenizer.added_tokens_decoder.values()
        words = [
            token.content
            for token in added
            if token.content
            and not token.content.isspace()
            and (token.special or token.content in self._source)
        ]
        return re.compile(
            "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"
        )

    @property
    def sha256(self) -> str:
        """Hex digest over all that decides how a conversation is written."""
        names = self._tokenizer.special_tokens_map
        content = {
            "template": self._source,
            "special tokens": {name: str(token) for name, token in names.items() if name in self._source},
            "plain": self.is_plain,
            "folds system": self.folds_system,
            "adds bos": str(self._tokenizer.bos_token) if adds_bos(self._tokenizer) else None,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _apply(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError as JinjaError

        try:
            text: str = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._text,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                date_string=_FIXED_DATE,
            )
        except (JinjaError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateError(
                f"The chat template cannot render {_described(turns)}: {error}",
                "Check the roles of the conversation, or use a model with another chat template.",
            ) from error
        return text

    def _check_and_probe(self) -> None:
        user = {"role": "user", "content": _PROBE_USER}
        if _PROBE_USER not in self._apply([user], True):
            raise TemplateError(
                "The chat template leaves out the user's text.",
                "Use a model whose template takes plain text.",
            )
        try:
            both = self._apply([{"role": "system", "content": _PROBE_SYSTEM}, user], True)
            self.folds_system = _PROBE_SYSTEM not in both
        except TemplateError:
            self.folds_system = True


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint (hex) of how `tokenizer` writes conversations; equal in training and inference."""
    return ChatTemplate(tokenizer).sha256


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts its BOS before a plain text."""
    if tokenizer.bos_token_id is None:
        return False
    ids: list[int] = tokenizer("a", verbose=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # several named templates, none called default
        raise TemplateError(f"The tokenizer's chat templates cannot be used: {error}") from error
    return template


def _folded(messages: Sequence[Message]) -> list[Message]:
    """Put the system text before the first user message."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    rest = [message for message in messages if message.role != "system"]
    for index, message in enumerate(rest):
        if system and message.role == "user":
            rest[index] = Message("user", f"{system}\n\n{message.content}")
            break
    return rest


def _described(turns: Sequence[Any]) -> str:
    roles = ", ".join(turn["role"] for turn in turns[:8]) + (", …" if len(turns) > 8 else "")
    return f"a conversation of {len(turns)} turns ({roles})"
