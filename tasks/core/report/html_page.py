"""Pages that open without a network: templates, embedded scripts, and the policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from tasks.core.evaluation.wording import is_share, label, percent, shown, shown_difference

_HERE = Path(__file__).parent


def render_page(template: str, script_names: Sequence[str], **values: Any) -> str:
    """Fill a template of `templates/`; it gets `style`, `scripts`, `policy` and the given values.

    Every value is escaped unless the template marks it safe; `script_names` are files of `assets/`.
    """
    scripts = [_script(name) for name in script_names]
    page = _environment().get_template(template)
    return str(
        page.render(
            style=_asset("report.css"), scripts=scripts, policy=_content_security_policy(scripts), **values
        )
    )


def json_for_html(value: Any) -> str:
    """JSON that can stand in a script element: no character starts markup."""
    text = orjson.dumps(value).decode()
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def duration(seconds: float) -> str:
    """Seconds as people say them: "42 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "label": label,
        "shown": shown,
        "shown_difference": shown_difference,
        "percent": percent,
        "duration": duration,
        "gigabytes": lambda size: f"{size / 1e9:.2f} GB",
    }
    environment.globals["is_share"] = is_share
    return environment


@cache
def _asset(name: str) -> str:
    return (_HERE / "assets" / name).read_text(encoding="utf-8")


def _script(name: str) -> str:
    """A script to inline; the sequence that would end the script element early is escaped."""
    return f"\n{_asset(name)}\n".replace("</script", "<\\/script")


def _content_security_policy(scripts: Iterable[str]) -> str:
    """Only these scripts run, and nothing is fetched: whatever a row's text contains."""
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
