"""The champion's line: pointer and history agree after every fault, or the next use says what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from flows.cli.commands import main
from flows.cli.commands.models import list_models
from tasks.core.config import load_config
from tasks.core.errors import ModelLoadError, ModelNotFoundError, PromotionError, StorageError
from tasks.core.evaluation.opponents.run_lookup import find_champion_run
from tasks.core.models import digests
from tasks.core.models.trained import alias, alias_folder, champion
from tasks.core.models.trained.discovery import discover_model
from tasks.core.models.trained.history import read_history
from tasks.core.models.trained.registry import promoted_run
from tasks.core.promotion.promotion import (
    Actor,
    champions,
    current_promotion,
    promote,
    promotion_history,
    roll_back,
)
from tasks.core.report.leaderboard import read_leaderboard
from tasks.core.storage.store import Store
from tasks.evaluator import Evaluator
from tests.making.model_runs import make_run
from tests.promotion.test_promotion import evidence

ANNA = Actor("anna")
NAMES = ("one", "two", "three")
ROOT = Path(__file__).resolve().parents[2]


def force(models_dir: Path, run_name: str, reason: str = "because") -> None:
    """Promote a model without evidence."""
    promote(models_dir, run_name, Actor("anna", reason), None, force=True)


@pytest.fixture(scope="module")
def unpromoted(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Three complete models. Do not write to them."""
    models_dir = tmp_path_factory.mktemp("unpromoted") / "models"
    for name in NAMES:
        make_run(models_dir, name, base=tiny_model_dir)
    return models_dir


@pytest.fixture(scope="module")
def promoted(unpromoted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three complete models, promoted one after the other. Do not write to them."""
    models_dir = Path(shutil.copytree(unpromoted, tmp_path_factory.mktemp("promoted") / "models"))
    for name in NAMES:
        force(models_dir, name)
    return models_dir


@pytest.fixture
def models(promoted: Path, tmp_path: Path) -> Path:
    """Three complete models, promoted one after the other, that a test may damage."""
    return Path(shutil.copytree(promoted, tmp_path / "models"))


def change_weights(models_dir: Path, run_name: str) -> None:
    """Flip a bit of a model's weights."""
    path = models_dir / run_name / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def folders(models_dir: Path) -> list[str]:
    """The settings that name the folders of a test."""
    return [f"--pipeline.models_dir={models_dir}", f"--pipeline.runs_dir={models_dir.parent / 'runs'}"]


# --- what a reason may hold

SEPARATORS = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\r\n", "\n", "\0"]


@pytest.mark.parametrize(
    "mark", SEPARATORS, ids=[f"U+{ord(mark[-1]):04X}-{len(mark)}" for mark in SEPARATORS]
)
def test_a_reason_may_hold_whatever_ends_a_line_elsewhere(
    tmp_path: Path, unpromoted: Path, mark: str
) -> None:
    models = Path(shutil.copytree(unpromoted, tmp_path / "models"))
    for name in NAMES:
        force(models, name, f"first{mark}second")
    assert [entry.reason for entry in promotion_history(models)] == [f"first{mark}second"] * 3
    assert roll_back(models, ANNA)[0].run_name == "two"


def test_a_reason_that_is_no_unicode_is_written_down_as_far_as_it_is(models: Path) -> None:
    force(models, "one", "caf\udce9")
    assert promotion_history(models)[-1].reason == "caf?"


# --- damage: the next use refuses, and names file and line


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 20])


def _in_line(number: int, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(models_dir: Path) -> None:
        path = models_dir / "promotions.jsonl"
        lines = path.read_bytes().split(b"\n")
        lines[number - 1] = change(lines[number - 1])
        path.write_bytes(b"\n".join(lines))

    return damage


def _without_line(number: int) -> Callable[[Path], None]:
    def damage(models_dir: Path) -> None:
        path = models_dir / "promotions.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[: number - 1], *lines[number:]]))

    return damage


def _pointer_holds(text: str) -> Callable[[Path], int]:
    return lambda models_dir: (models_dir / "promoted.json").write_text(text)


def _pointer_is_a_folder(models_dir: Path) -> None:
    (models_dir / "promoted.json").unlink()
    (models_dir / "promoted.json").mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a NUL block": (_in_line(2, lambda line: bytes(len(line))), r"promotions\.jsonl, line 2 is damaged"),
    "a cut line": (_in_line(2, lambda line: line[:-9]), r"promotions\.jsonl, line 2 is damaged"),
    "no JSON": (_in_line(1, lambda line: b"x" + line), r"promotions\.jsonl, line 1 is damaged"),
    "no UTF-8": (_in_line(1, lambda line: line.replace(b"because", b"beca\xffse")), "line 1 is damaged"),
    "no object": (_in_line(2, lambda line: b"[]"), r"promotions\.jsonl, line 2 is damaged"),
    "a key that is gone": (_in_line(2, lambda line: line.replace(b'"action"', b'"acti0n"')), "line 2 is damaged"),
    "a name that leads out": (_in_line(3, lambda line: line.replace(b'"three"', b'"../ab"')), "line 3 is damaged"),
    "a flipped bit": (_in_line(1, lambda line: line.replace(b'"because"', b'"becausd"')), "line 2 is damaged"),
    "another model's name": (_in_line(2, lambda line: line.replace(b'"two"', b'"one"')), "line 3 is damaged"),
    "a line that is gone": (_without_line(2), "line 2 is damaged: the line before it is gone or was changed"),
    "the first line twice": (_in_line(1, lambda line: line + b"\n" + line), "line 2 is damaged: .* there twice"),
    "the last line twice": (_in_line(3, lambda line: line + b"\n" + line), "line 4 is damaged: .* there twice"),
    "the first line gone": (_without_line(1), "line 1 is damaged: the line before it is gone or was changed"),
    "the last line gone": (_without_line(3), r"says that three is promoted, but line 2 .* the last, says two"),
    "the last line cut": (lambda m: _cut(m / "promotions.jsonl"), "says that three is promoted, but line 2"),
    "the last line changed": (_in_line(3, lambda line: line.replace(b'"because"', b'"becausd"')), "not say the same"),
    "no history": (lambda m: (m / "promotions.jsonl").unlink(), r"promotions\.jsonl, .* is missing or empty"),
    "an empty history": (lambda m: (m / "promotions.jsonl").write_bytes(b""), "is missing or empty"),
    "no pointer": (lambda m: (m / "promoted.json").unlink(), r"promoted\.json is missing, but line 3 .* three"),
    "an empty pointer": (_pointer_holds(""), r"promoted\.json names no run"),
    "a pointer of zeros": (_pointer_holds("\0" * 99), r"promoted\.json names no run"),
    "another pointer": (_pointer_holds('{"run_name": "one"}'), "says that one is promoted, but line 3"),
    "a folder as pointer": (_pointer_is_a_folder, r"promoted\.json cannot be read"),
}  # fmt: skip


@pytest.fixture(params=DAMAGE)
def damaged(request: pytest.FixtureRequest, models: Path) -> tuple[Path, str]:
    """Models whose line of champions is damaged in one way, and what is told of it."""
    damage, told = DAMAGE[request.param]
    damage(models)
    return models, told


def test_damage_is_refused_at_each_use_with_what_to_do(
    damaged: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    models, told = damaged
    before = {
        path.name: path.read_bytes() for path in models.iterdir() if path.is_file() and path.stat().st_size
    }
    found = evidence(models, "two", champion="three")
    (tmp_path / "run").mkdir()
    config = load_config(overrides={"pipeline.models_dir": str(models)}, environ={})
    uses: dict[str, Callable[[], object]] = {
        "rollback": lambda: roll_back(models, ANNA),
        "promote": lambda: promote(models, "two", ANNA, found),
        "discovery": lambda: discover_model(model="promoted", hf_user_id=None, models_dir=models),
        "the name": lambda: promoted_run(models),
        "the promotion": lambda: current_promotion(models),
        "the line in a report": lambda: champions(models),
        "the opponent": lambda: find_champion_run(tmp_path / "run", models, tmp_path),
        "before an evaluation": lambda: Evaluator(config).check(),
    }
    for name, use in uses.items():
        with pytest.raises(ModelLoadError, match=told) as caught:
            print(name, use())
        assert "put" in str(caught.value.next_step) or "check" in str(caught.value.next_step)
    caplog.clear()
    read_leaderboard(tmp_path / "runs", models)
    list_models(config)
    assert "no run is marked as the promoted model's" in caplog.text
    assert "warning: " in capsys.readouterr().out, (
        "models are listed, none as the promoted one, and the damage is told"
    )
    assert before == {path.name: path.read_bytes() for path in models.iterdir() if path.name in before}


@pytest.mark.parametrize("name", ["one", "three"])
def test_force_with_a_reason_mends_every_damage_tells_it_and_keeps_what_was_there(
    damaged: tuple[Path, str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    models, told = damaged
    if (models / "promoted.json").is_dir():  # nobody's to remove
        with pytest.raises(StorageError, match="Nothing was changed"):
            force(models, name)
        return
    history = models / "promotions.jsonl"
    content = history.read_bytes() if history.exists() else b""
    caplog.clear()
    promoted = promote(models, name, Actor("anna", "mended"), None, force=True)
    assert promoted.forced and current_promotion(models) == promoted
    assert re.search(told, caplog.text) and "as --force asks" in caplog.text
    kept = [history.read_bytes(), *(path.read_bytes() for path in models.glob("promotions.jsonl.damaged-*"))]
    whole = content[: content.rfind(b"\n") + 1]
    assert any(one.startswith(whole) for one in kept)
    assert promotion_history(models)[-1].reason == "mended"
    force(models, "two")
    assert roll_back(models, ANNA)[0].run_name == name


def test_a_history_that_begins_anew_is_listed_with_the_damaged_one_beside_it(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        (models / "promotions.jsonl").write_bytes(b"{ damaged\n")
        force(models, "two", f"mended {number}")
    with pytest.raises(PromotionError, match="two is the first promoted model"):
        roll_back(models, ANNA)
    assert main(["models", "--history", *folders(models)]) == 0
    shown = capsys.readouterr().out
    assert "mended 2" in shown and "promotions.jsonl.damaged-1" in shown and "damaged-2" in shown


@pytest.mark.parametrize("damage", ["the last line gone", "the last line cut"])
def test_a_history_that_lacks_the_promotion_in_force_is_kept_beside_and_not_gone_on_with(
    models: Path, damage: str
) -> None:
    DAMAGE[damage][0](models)
    content = (models / "promotions.jsonl").read_bytes()
    force(models, "one", "mended")
    assert (models / "promotions.jsonl.damaged-1").read_bytes() == content
    (entry,) = promotion_history(models)
    assert (entry.promotion.run_name, entry.replaced) == ("one", "three")
    with pytest.raises(PromotionError, match="one is the first promoted model"):
        roll_back(models, ANNA)  # not to a model that was not the one before


def test_a_history_of_an_earlier_version_is_read_and_gone_on_with(models: Path) -> None:
    history = models / "promotions.jsonl"
    lines = [json.loads(line) for line in history.read_bytes().split(b"\n") if line]
    old = [
        {key: value for key, value in line.items() if key not in ("change_id", "previous")} for line in lines
    ]
    history.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert roll_back(models, ANNA)[0].run_name == "two"
    force(models, "one")
    assert len(read_history(history).changes) == 5


def test_an_addition_that_was_cut_off_never_was(models: Path) -> None:
    with (models / "promotions.jsonl").open("ab") as file:
        file.write(b'{"action": "rollback", "promotion": {"run_na')
    assert promoted_run(models) == "three"
    assert roll_back(models, ANNA)[0].run_name == "two"
    assert len(promotion_history(models)) == 4


def test_a_last_line_without_its_newline_is_whole(models: Path) -> None:
    path = models / "promotions.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert roll_back(models, ANNA)[0].run_name == "two"
    assert [entry.promotion.run_name for entry in promotion_history(models)] == ["one", "two", "three", "two"]


def test_a_history_that_is_a_link_is_not_written_through(models: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jsonl"
    (models / "promotions.jsonl").rename(outside)
    (models / "promotions.jsonl").symlink_to(outside)
    content = outside.read_bytes()
    with pytest.raises(StorageError, match="three is still promoted"):
        roll_back(models, ANNA)
    assert outside.read_bytes() == content


def test_a_link_to_the_promoted_model_that_leads_out_is_no_name(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_run(tmp_path / "models", "two", base=tiny_model_dir)
    make_run(tmp_path / "elsewhere", "two", base=tiny_model_dir)
    (tmp_path / "models" / "promoted").symlink_to("../elsewhere/two")
    with pytest.raises(ModelLoadError, match=r"is a link to .*elsewhere/two, which is no model in"):
        promoted_run(tmp_path / "models")


def test_a_folder_of_models_whose_name_is_no_ascii_can_be_promoted_in(models: Path) -> None:
    moved = models.rename(models.with_name("modèles 模型"))
    assert roll_back(moved, ANNA)[0].run_name == "two"
    assert promoted_run(moved) == "two"


# --- the weights of the champion


def test_a_champion_whose_files_changed_answers_nothing(models: Path, tmp_path: Path) -> None:
    change_weights(models, "three")
    changed = "the files of the promoted model three have changed since it was promoted"
    with pytest.raises(ModelLoadError, match=changed):
        discover_model(model="promoted", hf_user_id=None, models_dir=models)
    with pytest.raises(PromotionError, match=changed):
        promote(models, "one", ANNA, evidence(models, "one"))
    (tmp_path / "run").mkdir()
    opponent = find_champion_run(tmp_path / "run", models, tmp_path)
    assert opponent is not None and opponent.path is None and opponent.reason is not None
    assert changed[1:] in opponent.reason


@pytest.mark.parametrize("way_on", ["rollback", "as it is"])
def test_from_a_champion_whose_files_changed_there_is_a_way_on(models: Path, way_on: str) -> None:
    change_weights(models, "three")
    if way_on == "rollback":
        roll_back(models, ANNA)
    else:
        force(models, "three")
    chosen = discover_model(model="promoted", hf_user_id=None, models_dir=models).chosen
    assert Path(chosen.model_id).name == ("two" if way_on == "rollback" else "three")


def test_weights_whose_size_and_times_are_known_are_not_read_again(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(digests, "_REMEMBERED_BYTES", 1)
    promoted = champion.current_champion(models)
    assert promoted is not None
    champion.refuse_changed(models, promoted)
    assert digests.unread_bytes(models / "three") == 0
    path = models / "three" / "adapter_model.safetensors"
    os.utime(path)
    assert digests.unread_bytes(models / "three") == path.stat().st_size
    monkeypatch.setattr(champion, "_LONG_READING_BYTES", 1)
    with caplog.at_level("INFO"):
        champion.refuse_changed(models, promoted)
    assert "to see that" in caplog.text and "three is what was promoted" in caplog.text


def test_a_promoted_model_that_is_gone_is_not_found(models: Path) -> None:
    shutil.rmtree(models / "three")
    with pytest.raises(ModelNotFoundError, match="promoted, but its directory is gone"):
        discover_model(model="promoted", hf_user_id=None, models_dir=models)


# --- models at a URL


def test_at_a_url_the_history_is_compared_too_and_what_was_removed_there_is_gone_here(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "cache"))
    store = Store(models.as_uri())
    assert promoted_run(store) == "three"
    (models / "promoted.json").unlink()
    with pytest.raises(ModelLoadError, match=r"promoted\.json is missing, but line 3"):
        promoted_run(store)
    (models / "promotions.jsonl").unlink()
    assert promoted_run(store) is None


# --- faults while the alias is moved


@pytest.fixture(scope="module")
def faults(promoted: Path) -> Iterator[list[dict[str, Any]]]:
    """What was left by a promotion, a rollback and a mending that failed at each of their calls."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        mended = Path(shutil.copytree(promoted, Path(folder) / "damaged"))
        (mended / "promotions.jsonl").write_bytes(b"{ damaged\n")
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "TUNEPROOF_CACHE": f"{folder}/cache"}
        found = []
        for models_dir, *commands in ((promoted, "rollback", "one"), (mended, "two")):
            given = [str(models_dir), f"{folder}/work", *map(str, commands)]
            command = [sys.executable, "-m", "tests.making.promotion_faults", *given]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
            found += [json.loads(line) for line in done.stdout.splitlines()]
        yield found


def test_every_kind_of_fault_was_tried_at_every_call(faults: list[dict[str, Any]]) -> None:
    tried = {(fault["command"], fault["kind"]) for fault in faults}
    assert tried == set(itertools.product(("rollback", "one", "two"), ("kill", "once", "full", "gone")))
    assert sum(fault["kind"] == "kill" for fault in faults) > 40
    assert {fault["code"] for fault in faults} == {-9, 0, 1}, "killed, done or refused, never a traceback"


def test_after_every_fault_pointer_and_history_agree_on_the_model_before_or_after(
    faults: list[dict[str, Any]],
) -> None:
    after = {"rollback": "two", "one": "one", "two": "two"}
    for fault in faults:
        held, name = fault["held"], after[fault["command"]]
        if "error" in held:
            assert fault["command"] == "two" and "line 1 is damaged" in held["error"], fault  # as it was
        else:
            assert held["agree"] and held["champion"] in ("three", name), fault
        if fault["code"] == 0:
            assert held["champion"] == name, fault


def test_a_command_that_failed_says_what_holds(faults: list[dict[str, Any]]) -> None:
    after = {"rollback": "two", "one": "one", "two": "two"}
    for fault in (fault for fault in faults if fault["code"] == 1):
        if "Nothing was changed" in fault["told"]:
            assert fault["held"].get("champion", "three") == "three", fault
        else:
            assert (
                f"{after[fault['command']]} is written down in promotions.jsonl as promoted" in fault["told"]
            )
            assert fault["held"]["champion"] == after[fault["command"]], fault


def test_a_full_disk_changes_nothing(faults: list[dict[str, Any]]) -> None:
    for fault in faults:
        if fault["kind"] == "full" and fault["command"] != "two":
            assert fault["code"] == 0 or "Nothing was changed" in fault["told"], fault


def test_the_same_command_again_ends_where_one_ends_and_goes_no_step_further(
    faults: list[dict[str, Any]],
) -> None:
    for fault in (fault for fault in faults if fault["code"]):
        code, told = fault["again"]
        name, lines = {"rollback": ("two", 4), "one": ("one", 4), "two": ("two", 1)}[fault["command"]]
        assert (code, told) == (0, ""), fault
        assert (fault["held_then"]["champion"], fault["held_then"]["lines"]) == (name, lines), fault


def test_a_rollback_that_nobody_was_told_of_is_told_and_not_repeated(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*_: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        roll_back(models, ANNA, die)
    assert promoted_run(models) == "two"
    assert main(["rollback", *folders(models)]) == 0
    shown = capsys.readouterr().out
    assert (
        "promoted again: two, in place of three." in shown
        and "to go one further, run the command again" in shown
    )
    assert main(["rollback", *folders(models)]) == 0
    assert "promoted again: one, in place of two." in capsys.readouterr().out


def test_a_promotion_ends_the_rollback_that_was_cut_off_before_it(models: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        roll_back(models, ANNA, lambda *_: print(1 / 0))
    force(models, "three")
    assert roll_back(models, ANNA)[0].run_name == "two"
    assert roll_back(models, ANNA)[0].run_name == "one"


def test_a_folder_that_is_read_only_is_told_and_still_read(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class ReadOnly(FileLock):
        def acquire(self, *_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied", self.lock_file)

    monkeypatch.setattr(alias_folder, "FileLock", ReadOnly)
    assert main(["promote", "one", "--force", "--reason", "x", *folders(models)]) == 1
    assert main(["rollback", *folders(models)]) == 1
    told = capsys.readouterr().err
    assert (
        told.count("cannot be written: Permission denied. Nothing was changed") == 2
        and "Traceback" not in told
    )
    assert promoted_run(models) == "three"


def test_where_the_pointer_cannot_follow_the_history_counts(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer = (models / "promoted.json").read_bytes()
    with pytest.raises(ZeroDivisionError):
        roll_back(models, ANNA, lambda *_: print(1 / 0))
    (models / "promoted.json").write_bytes(pointer)  # as if it had been killed before the move

    def full(path: Path, text: str) -> None:
        raise StorageError(f"{path} could not be written: No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(alias_folder, "write_atomically", full)
        assert promoted_run(models) == "two"
        promotion = current_promotion(models)
        assert promotion is not None and promotion.run_name == "two"
    assert (models / "promoted.json").read_bytes() == pointer
    assert promoted_run(models) == "two"
    assert json.loads((models / "promoted.json").read_bytes())["run_name"] == "two"


def test_ten_processes_at_once_leave_one_line_that_pointer_and_history_share(models: Path) -> None:
    command = [sys.executable, "-m", "tests.making.promotion_faults", "--crowd", str(models), "10"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert json.loads(done.stdout) == [0] * 10, done.stderr
    line = alias.read_line(models)
    assert line.pointer == line.decided and line.mark is None
    entries = promotion_history(models)
    assert len(entries) > 10
    for before, after in itertools.pairwise(entries):
        assert after.replaced == before.promotion.run_name
