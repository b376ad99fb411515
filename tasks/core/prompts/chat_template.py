"""A tokenizer's chat template: conversation -> text, and the fingerprint of how it does that."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.core.errors import ConfigError, TemplateError, first_line
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
_PROBE_SYSTEM, _PROBE_USER, PROBE_ANSWER, _PROBE_THOUGHTS = (
    "qzsystemzq",
    "qzuserzq",
    "qzanswerzq",
    "qzthoughtzq",
)
# Where templates look for an assistant's thoughts, the usual name first.
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
# What an end token that is no special token must look like: `<|im_end|>`, `[/TURN]`, never a word or a line.
_MARKER_SHAPE = re.compile(r"[<\[|◁\uff5c].*[>\]|▷\uff5c]", re.DOTALL)


class Rendered(NamedTuple):
    """A conversation as text. `is_marked`: control tokens in a user's text wear transformers' private markers."""

    text: str
    is_marked: bool


class ChatTemplate:
    """How one tokenizer writes conversations.

    `variables` are given to the template with each rendering (`enable_thinking = false`), `source` takes the
    place of the tokenizer's own template. Without a template a plain one is used; where the template takes no
    system message, its text is put before the first user message. Raises TemplateError when even one question
    cannot be rendered, ConfigError for a variable that is not the user's to set.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any] | None = None,
        *,
        source: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        own = _own_template(tokenizer) if source is None else source
        self.is_plain = own is None
        self.source = PLAIN_TEMPLATE if own is None else own
        self._text = _FIXED_CLOCK + self.source if "strftime_now" in self.source else self.source
        self.folds_system = False
        self.own_characters = 0
        """What the template writes besides a short question, about."""
        self._variable_characters = len(repr(self.variables))
        self._check_variables()
        self._check_and_probe()

    def with_source(self, source: str) -> ChatTemplate:
        """The same tokenizer and variables with another template text."""
        return ChatTemplate(self.tokenizer, self.variables, source=source)

    def keeping_variables(self) -> ChatTemplate:
        """The same template with its variables written into its text, as what it takes when none are given."""
        if not self.variables or self.is_plain:
            return self
        return ChatTemplate(self.tokenizer, source=with_defaults(self.source, self.variables))

    def reads(self, name: str) -> bool:
        """Whether the template's text uses a variable of this name."""
        return re.search(rf"(?<![\w.'\"]){re.escape(name)}(?![\w'\"])", self.source) is not None

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
            turn = {"role": message.role, "content": content}
            if message.reasoning is not None and self.thought_key is not None:
                turn[self.thought_key] = message.reasoning
            turns.append(turn)
        return Rendered(self._apply(turns, add_generation_prompt), is_marked)

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes behind a question to ask for its answer."""
        asked = self._apply([_user()], True)
        return asked[asked.rindex(_PROBE_USER) + len(_PROBE_USER) :]

    @cached_property
    def answer_opening(self) -> str | None:
        """What stands before a finished answer but not at the end of a prompt: "" for most templates.

        None where a finished conversation does not begin with the prompt, or has no answer in it.
        """
        asked, answered = self._apply([_user()], True), self._answered
        if answered is None or not answered.startswith(asked):
            return None
        return answered[len(asked) : answered.rindex(PROBE_ANSWER)]

    @cached_property
    def answer_tail(self) -> str:
        """What the template writes behind the last answer of a finished conversation."""
        answered = self._answered
        return "" if answered is None else answered[answered.rindex(PROBE_ANSWER) + len(PROBE_ANSWER) :]

    @cached_property
    def turn_end(self) -> str | None:
        """The token that ends an answer; None where the template writes none that the tokenizer knows as one.

        Special tokens count, and added ones that look like a marker; never line breaks or words.
        """
        found = re.match(rf"\s*({self.control_tokens.pattern})", self.answer_tail)
        return found.group(1) if found and self._ends_turns(found.group(1)) else None

    @property
    def turn_end_id(self) -> int | None:
        """The id of `turn_end`."""
        if self.turn_end is None:
            return None
        token_id: int = self.tokenizer.convert_tokens_to_ids(self.turn_end)
        return token_id

    @property
    def markers(self) -> tuple[str, ...]:
        """The tokens that the template itself puts around questions and answers, the BOS aside."""
        found = self.control_tokens.findall((self._answered or "") + self.generation_prompt)
        return tuple(dict.fromkeys(token for token in found if token != self.tokenizer.bos_token))

    @property
    def asks_otherwise_by_variables(self) -> bool:
        """Whether `variables` change a prompt."""
        unasked = ChatTemplate(self.tokenizer, source=self.source)
        turns = [Message("user", _PROBE_USER)]
        if not self.folds_system:
            turns.insert(0, Message("system", _PROBE_SYSTEM))
        asked = [template.render(turns, add_generation_prompt=True) for template in (self, unasked)]
        return asked[0] != asked[1]

    @property
    def unknown_end(self) -> str | None:
        """A marker that the template writes behind an answer, but that is no token of this tokenizer."""
        tail = self.answer_tail.strip()
        found = re.match(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{1,40}\]", tail)
        return found.group() if self.turn_end is None and found else None

    @cached_property
    def thought_key(self) -> str | None:
        """The key of a turn from which the template takes an assistant's thoughts; None where it takes none."""
        for key in _THOUGHT_KEYS:
            if key not in self.source:
                continue
            turn = {"role": "assistant", "content": PROBE_ANSWER, key: _PROBE_THOUGHTS}
            try:
                if _PROBE_THOUGHTS in self._apply([_user(), turn], False):
                    return key
            except TemplateError:
                continue
        return None

    @cached_property
    def _answered(self) -> str | None:
        try:
            text = self._apply([_user(), {"role": "assistant", "content": PROBE_ANSWER}], False)
        except TemplateError:
            return None
        return text if PROBE_ANSWER in text else None

    def _ends_turns(self, token: str) -> bool:
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        return (
            token in special
            or token == self.tokenizer.eos_token
            or _MARKER_SHAPE.fullmatch(token) is not None
        )

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Matches the special tokens, and the other added tokens that the template writes itself."""
        added = self.tokenizer.added_tokens_decoder.values()
        words = [
            token.content
            for token in added
            if token.content
            and not token.content.isspace()
            and (token.special or token.content in self.source)
        ]
        return re.compile(
            "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"
        )

    @property
    def sha256(self) -> str:
        """Hex digest over all that decides how a conversation is written, but `variables`."""
        names = self.tokenizer.special_tokens_map
        content = {
            "template": self.source,
            "special tokens": {name: str(token) for name, token in names.items() if name in self.source},
            "plain": self.is_plain,
            "folds system": self.folds_system,
            "adds bos": str(self.tokenizer.bos_token) if adds_bos(self.tokenizer) else None,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _apply(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError as JinjaError

        from tasks.core.prompts.template_limits import check_rendered, limited_rendering

        given = self.variables
        if with_defaults("", {"date_string": ""})[:40] not in self.source:
            given = {"date_string": _FIXED_DATE, **given}
        try:
            with limited_rendering(self._text):
                text: str = self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=self._text,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **given,
                )
            check_rendered(
                len(text), self._variable_characters + sum(len(v) for t in turns for v in t.values())
            )
        except (MemoryError, RecursionError) as error:
            raise TemplateError(
                f"The chat template cannot render {_described(turns)}: "
                + ("memory ran out" if isinstance(error, MemoryError) else "it calls itself without end"),
                "Use a model with another chat template, or set chat_template.",
            ) from None
        except (JinjaError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateError(
                f"The chat template cannot render {_described(turns)}: {first_line(error)}",
                "Check the roles of the conversation, or use a model with another chat template.",
            ) from error
        return text

    def _check_variables(self) -> None:
        arguments = inspect.signature(self.tokenizer.apply_chat_template).parameters.keys()
        reserved = sorted(({"messages", *arguments} - {"tools", "documents"}) & self.variables.keys())
        if reserved:
            raise ConfigError(
                f"chat_template_kwargs sets {reserved[0]}, which is not the template's variable to set",
                "remove it; chat_template_kwargs is for variables such as enable_thinking",
            )

    def _check_and_probe(self) -> None:
        user = _user()
        asked = self._apply([user], True)
        self.own_characters = len(asked)
        if _PROBE_USER not in asked:
            raise TemplateError(
                "The chat template leaves out the user's text.",
                "Use a model whose template takes plain text.",
            )
        try:
            both = self._apply([{"role": "system", "content": _PROBE_SYSTEM}, user], True)
            self.folds_system = _PROBE_SYSTEM not in both
        except TemplateError:
            self.folds_system = True


def with_defaults(source: str, variables: Mapping[str, Any]) -> str:
    """The template with values for variables that are not given: what `source` does with them, it does unasked."""
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in sorted(variables.items())
    ]
    # A line break behind a block is dropped; so white space at the source's start keeps what it means there.
    return "".join(lines) + ("\n" if lines and source[:1].isspace() else "") + source


def with_generation_prompt(source: str, text: str) -> str:
    """The template with `text` behind its generation prompt."""
    return f"{source.removesuffix(chr(10))}{{{{ {_literal(text)} if add_generation_prompt else '' }}}}"


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint (hex) of how `tokenizer` writes conversations; equal in training and inference."""
    return ChatTemplate(tokenizer).sha256


def set_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Put another chat template in the place of the tokenizer's own; of several named ones, of the default."""
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {**tokenizer.chat_template, "default": source}
    else:
        tokenizer.chat_template = source


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that closes an assistant's turn in the tokenizer's own template; None without one."""
    if not tokenizer.chat_template:
        return None
    try:
        return ChatTemplate(tokenizer).turn_end_id
    except TemplateError:  # who renders with it says so
        return None


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


def _user() -> dict[str, str]:
    return {"role": "user", "content": _PROBE_USER}


def _literal(value: Any) -> str:
    """A value of JSON's kinds as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


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
