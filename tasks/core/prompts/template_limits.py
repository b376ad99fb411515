"""Limits of what a chat template may do, which is a small program that comes with a model from anywhere.

transformers renders templates in jinja2's sandbox, which keeps them from files and from Python's internals, but lets
them compute for ever (loops in loops) and fill memory (`'a' * 10**10`). Here that sandbox counts: each pass of a loop
and each macro looks at the time, and what makes a text longer is asked first how long it will be. Outside of
`limited_rendering` the sandbox works as it does without us.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0
"""Time of the thread's own computing for one conversation; templates take less than a millisecond."""
CHARACTERS = 64_000_000
"""Length of any one text that a template makes."""
MEMORY_BYTES = 2 << 30
"""What long texts together may take."""
TEMPLATE_CHARACTERS = 1_000_000
"""Length of a template, and of what it may write of its own."""
RENDERED_CHARACTERS = 16_000_000
"""Length of a rendered conversation; a tokenizer takes hundreds of bytes for each character, or ends the process."""
_RENDERED_TIMES = 10  # a template may write what it is given more than once, and escaped
_LARGEST_NUMBER = 100_000  # for widths, indents and the like; as jinja2's own limit for ranges
_INTEGER_BITS = 10_000
_STEPS_PER_LOOK = 20
_LONG_CHARACTERS = 100_000
_WIDE_FORMAT = re.compile(r"\d{6,}")


class TemplateLimitError(JinjaError):
    """A template goes on for too long, or makes too much text."""


class _Budget:
    """The time and memory one rendering has left. Time that the thread is not computing does not count."""

    def __init__(self) -> None:
        self._end = time.thread_time() + SECONDS
        self._steps = 0
        self._long_characters = 0
        self._bytes_before: int | None = None

    def step(self) -> None:
        self._steps += 1
        if self._steps % _STEPS_PER_LOOK == 0 and time.thread_time() > self._end:
            raise TemplateLimitError(f"it computes for more than {SECONDS:g} seconds")

    def make(self, length: int) -> None:
        """Note that a text or list of this length comes next."""
        self._steps += _STEPS_PER_LOOK - 1 - self._steps % _STEPS_PER_LOOK
        self.step()
        if self._bytes_before is None:
            self._bytes_before = _resident_bytes()
        self._long_characters += length
        # Other threads take memory too, so both figures must be beyond the limit.
        if self._long_characters > MEMORY_BYTES and _resident_bytes() - self._bytes_before > MEMORY_BYTES:
            raise TemplateLimitError(f"its texts take more than {MEMORY_BYTES / 1e9:.1f} GB of memory")


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


_budget: ContextVar[_Budget | None] = ContextVar("template_budget", default=None)


@contextmanager
def limited_rendering(template: str = "") -> Iterator[None]:
    """Inside, transformers renders chat templates within the limits; beyond them it raises TemplateLimitError."""
    from transformers.utils import chat_template_utils as rendering

    if len(template) > TEMPLATE_CHARACTERS:
        raise TemplateLimitError(
            f"it has {len(template):,} characters, more than {TEMPLATE_CHARACTERS:,} that are read"
        )
    if rendering.ImmutableSandboxedEnvironment is not LimitedSandbox:
        rendering.ImmutableSandboxedEnvironment = LimitedSandbox
        rendering._compile_jinja_template.cache_clear()
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def check_rendered(length: int, given: int) -> None:
    """Raise TemplateLimitError for a rendering that is longer than what `given` characters are good for."""
    limit = min(RENDERED_CHARACTERS, TEMPLATE_CHARACTERS + _RENDERED_TIMES * given)
    if length > limit:
        raise TemplateLimitError(
            f"it makes {length:,} characters of {given:,}, more than the {limit:,} that are read"
        )


class _Filters(dict[str, Callable[..., Any]]):
    """jinja2's filters, each asked first how much it will make of what it is given."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _guarded(name, function))


class LimitedSandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits of time and size."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters = _Filters({name: _guarded(name, known) for name, known in self.filters.items()})
        self.globals.pop("lipsum", None)  # text without meaning, as much as one asks for
        self.filters["__step"], self.filters["__join"] = _stepped, _join

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What a template, macro or block wrote, joined."""
        if _budget.get() is None:
            return "".join(parts)
        kept, length = [], 0
        for part in parts:
            kept.append(part)
            length += len(part)
            _step()
            if length > CHARACTERS:
                break
        _check_length(length)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`; a result that is too large is refused before it is made."""
        if (
            operator == "+"
            and type(left) is str
            and type(right) is str
            and len(left) + len(right) < _LONG_CHARACTERS
        ):
            return left + right
        if _budget.get() is not None:
            _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2 has it
        """Call a function, a macro or a method of a text."""
        if _budget.get() is not None:
            _step()
            _check_call(__obj, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template's tree, with a look at the time in each loop and macro, and with joins that are limited."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
            step = _filtered("__step", [nodes.Const("", lineno=node.lineno)], node.lineno)
            node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        _with_limited_joins(tree)
        tree.set_environment(self)
        return tree


def _with_limited_joins(node: nodes.Node) -> None:
    """Let each `a ~ b` go through `_join`."""
    for name, value in list(node.iter_fields()):
        items = value if isinstance(value, list) else [value]
        for place, item in enumerate(items):
            if not isinstance(item, nodes.Node):
                continue
            _with_limited_joins(item)
            if isinstance(item, nodes.Concat):
                items[place] = _filtered("__join", item.nodes, item.lineno)
        setattr(node, name, items if isinstance(value, list) else items[0])


def _filtered(name: str, values: list[nodes.Expr], line: int) -> nodes.Filter:
    return nodes.Filter(values[0], name, values[1:], [], None, None, lineno=line)


def _step() -> None:
    budget = _budget.get()
    if budget is not None:
        budget.step()


@pass_context  # else jinja2 would compute it once, when it compiles the template
def _stepped(_: Context, value: str) -> str:
    _step()
    return value


@pass_context
def _join(_: Context, *parts: Any) -> str:
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def _check_length(length: int) -> None:
    if length < _LONG_CHARACTERS:
        return
    budget = _budget.get()
    if budget is None:
        return
    if length > CHARACTERS:
        raise TemplateLimitError(f"it makes a text of more than {CHARACTERS:,} characters")
    budget.make(length)


def _check_number(value: Any) -> None:
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        raise TemplateLimitError(f"it asks for a width or count of more than {_LARGEST_NUMBER:,}")


def _check_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        if (
            isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * max(1, right) > _INTEGER_BITS
        ):
            raise TemplateLimitError("it computes a number of thousands of digits")
    elif operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > _INTEGER_BITS:
                raise TemplateLimitError("it computes a number of thousands of digits")
            return
        items, times = (right, left) if isinstance(left, int) else (left, right)
        if hasattr(items, "__len__") and isinstance(times, int):
            _check_length(len(items) * times)
    elif operator == "+":
        if hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_length(len(left) + len(right))
    elif isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,))


def _check_format(text: str, values: Iterable[Any]) -> None:
    """A format that names a great width, or takes one from its values."""
    if _WIDE_FORMAT.search(text):
        raise TemplateLimitError(f"it asks for a width or count of more than {_LARGEST_NUMBER:,}")
    if "*" in text or re.search(r":[^{}]*\{", text):
        for value in values:
            _check_number(value)
    _check_length(len(text) + sum(len(value) for value in values if isinstance(value, str)))


def _check_call(called: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
    if name in ("format", "format_map") and not isinstance(called, type):
        given = args[0].values() if name == "format_map" and args and isinstance(args[0], Mapping) else args
        text = (
            owner if isinstance(owner, str) else getattr(getattr(called, "__wrapped__", None), "__self__", "")
        )
        _check_format(text, [*given, *kwargs.values()])
    elif isinstance(called, BuiltinMethodType) and isinstance(owner, (str, bytes, int)):
        _check_growth(name, owner, args, kwargs)


def _check_growth(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """How long `value` becomes by a method or filter of this name."""
    given = [*args, *kwargs.values()]
    if name == "replace" and len(given) >= 2:
        text, old, new = str(value), str(given[0]), str(given[1])
        _check_length(len(text) + text.count(old) * max(0, len(new) - len(old)))
    elif name == "join" and isinstance(value, str) and args and hasattr(args[0], "__len__"):  # the method
        _check_length(sum(len(value) + len(str(item)) for item in args[0]))
    elif name == "translate" and isinstance(value, str) and args and isinstance(args[0], Mapping):
        longest = max((len(item) for item in args[0].values() if isinstance(item, str)), default=1)
        _check_length(len(value) * max(1, longest))
    elif name in _SIZED:
        for item in given:
            _check_number(item)
            if name == "indent" and isinstance(value, str):
                width = len(item) if isinstance(item, str) else int(item) if isinstance(item, int) else 0
                _check_length(len(value) + (value.count("\n") + 1) * width)
            if name == "expandtabs" and isinstance(item, int):
                _check_length(len(value) + value.count("\t") * item)


_SIZED = {
    *("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"),
    *("indent", "batch", "slice", "round", "tojson", "wordwrap", "filesizeformat"),
}


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if name not in {*_SIZED, "replace", "join", "format"}:
        return function
    # What a filter gets before the value it is put on: the context, the environment.
    before = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if _budget.get() is None or len(args) <= before:
            return function(*args, **kwargs)
        value, given = args[before], args[before + 1 :]
        if name == "format":
            _check_format(str(value), [*given, *kwargs.values()])
        elif name == "join":
            separator = str(given[0]) if given else ""
            args = (*args[:before], _joinable(value, len(separator)), *given)
        else:
            _check_growth(name, value, given, kwargs)
        return function(*args, **kwargs)

    return guarded


def _joinable(items: Iterable[Any], separator: int) -> list[Any]:
    kept, length = [], 0
    for item in items:
        kept.append(item)
        length += separator + (len(item) if isinstance(item, str) else 0)
        _step()
        if length > CHARACTERS:
            break
    _check_length(length)
    return kept
