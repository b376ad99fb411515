"""Hostile chat templates: what a model may bring along to make prompts."""

from __future__ import annotations

from pathlib import Path

from tests.hostile.items import MARKER, Item, Outcome, changed_model

_MESSAGES = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _template(
    name: str, source: str, outcome: Outcome = "refused", says: str = "", *, slow: bool = False
) -> Item:
    def change(model_dir: Path) -> None:
        written = source.replace("MARKER", str(model_dir.parent / MARKER))
        (model_dir / "chat_template.jinja").write_text(written)

    return changed_model(f"template: {name}", change, outcome, says, slow=slow)


ITEMS: tuple[Item, ...] = (
    _template("empty", "", "answered"),
    _template("syntax error", "{% for message in %}"),
    _template("open block", "{% if true %}" + _MESSAGES),
    _template("unknown filter", "{{ messages | explode }}"),
    _template("unknown name", "{{ emperor.name }}" + _MESSAGES),
    _template("raises", "{{ raise_exception('no thanks') }}", says="no thanks"),
    _template("raises with escapes", "{{ raise_exception('\x1b[31mred\x1b]0;t\x07') }}"),
    _template("divides by zero", "{{ 1 // 0 }}"),
    _template("asks for nothing", "always the same"),
    _template("reaches for classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}" + _MESSAGES),
    _template("reaches for globals", "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}" + _MESSAGES),
    _template("reaches by format", "{{ '{0.__class__.__mro__}'.format(1) }}" + _MESSAGES),
    _template("includes a file", "{% include '/etc/passwd' %}"),
    _template("imports", "{% import 'os' as os %}{{ os.system('touch MARKER') }}"),
    _template("counts without end", "{% for a in range(10**9) %}x{% endfor %}" + _MESSAGES),
    _template(
        "loops in loops", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + _MESSAGES,
        slow=True,
    ),
    _template("text without end", "{{ 'a' * 10**10 }}" + _MESSAGES, slow=True),
    _template("long text", "{{ 'a b ' * 10**7 }}" + _MESSAGES, says="40,0.* characters of .*1,000,", slow=True),
    _template(
        "long text by pieces", "{% for a in range(99999) %}a b c d e f g {% endfor %}" + _MESSAGES,
        says="characters of",
    ),
    _template(
        "long text for each character", "{{ 'a b ' * (messages[0]['content'] | length) ** 4 }}" + _MESSAGES,
        "error rows", "characters of",
    ),
    _template(
        "text of most of a megabyte", "{{ 'a b ' * 240000 }}" + _MESSAGES, "error rows", "720,?009 tokens", slow=True
    ),
    _template("power without end", "{{ 9 ** (9 ** 9) }}" + _MESSAGES, slow=True),
    _template("calls itself", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    _template("of ten megabytes", _MESSAGES + "{# " + "x" * 10_000_000 + " #}", says="more than 1,000,000", slow=True),
    _template("of most of a megabyte", _MESSAGES + "{# " + "x" * 990_000 + " #}", "answered", slow=True),
    _template("deep brackets", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    _template("repeats the question", _MESSAGES * 3, "answered"),
    _template("control characters", "\x00\x1b[31m" + _MESSAGES, "answered"),
)  # fmt: skip
