"""The docs are true: links lead somewhere, commands exist, examples that claim to run do run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.core.config import load_config
from tests.making.warm.python import run_python

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
_BLOCK = re.compile(
    r"^(?P<mark><!-- runnable -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(kind: str, *, marked: bool = False) -> Iterator[tuple[Path, str]]:
    """Fenced blocks of one language; `marked` ones have a line `<!-- runnable -->` above."""
    for page in PAGES:
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            if match["kind"] == kind and (match["mark"] or not marked):
                yield page, match["text"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = _HEADING.findall(page.read_text(encoding="utf-8"))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def commands() -> Iterator[tuple[Path, str, str]]:
    """Every `tuneproof …` and `make …` that a console block shows after its prompt."""
    for page, text in blocks("console"):
        for line in text.splitlines():
            match = re.match(r"\$ (?:\w+=\S+ )*(?:\.venv/bin/)?(tuneproof|make) +([a-z-]+)", line)
            if match:
                yield page, match[1], match[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_of_the_docs_is_linked_from_their_index() -> None:
    linked = set(_LINK.findall((ROOT / "docs/README.md").read_text(encoding="utf-8")))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= {link.partition("#")[0] for link in linked}


def test_every_command_that_the_docs_show_exists() -> None:
    from flows.cli.commands import app

    known = {
        "tuneproof": set(app),
        "make": set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)),
    }
    shown = list(commands())
    assert shown
    assert not [(page.name, tool, name) for page, tool, name in shown if name not in known[tool]]


def test_every_toml_example_is_a_settings_file_that_loads(tmp_path: Path) -> None:
    for number, (page, text) in enumerate(blocks("toml")):
        path = tmp_path / f"{page.stem}-{number}.toml"
        path.write_text(text, encoding="utf-8")
        load_config(path, environ={"HF_USER": "someone", "DATA_DIR": "data"})


def test_every_python_example_is_valid_python() -> None:
    for page, text in blocks("python"):
        compile(text, str(page), "exec")


@pytest.mark.slow
def test_every_python_example_marked_runnable_runs(tmp_path: Path) -> None:
    examples = list(blocks("python", marked=True))
    assert examples
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for page, text in examples:
        done = run_python(["-c", text], cwd=tmp_path)
        assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stderr}"
