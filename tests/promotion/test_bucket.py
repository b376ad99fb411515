"""Promotion at a URL: the rules of a folder, kept by conditional writes or a lease; of two at once one holds."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli.commands import main
from tasks.core.errors import ConfigError, EvaluationError, ModelLoadError, PromotionError, StorageError
from tasks.core.evaluation import nights
from tasks.core.evaluation.nights import ChallengeBook, Look
from tasks.core.models.trained import alias
from tasks.core.models.trained.alias_bucket import BucketAlias
from tasks.core.models.trained.alias_files import HISTORY_NAME, POINTER_NAME, OvertakenError
from tasks.core.models.trained.champion import current_champion
from tasks.core.models.trained.discovery import find_model
from tasks.core.models.trained.model_store import list_models, send_model
from tasks.core.models.trained.registry import promoted_run
from tasks.core.promotion.promotion import Actor, current_promotion, promote, promotion_history, roll_back
from tasks.core.storage import versions
from tasks.core.storage.store import Store
from tasks.core.storage.versions import Version, has_conditional_writes, read_version, replace_version
from tests.making.buckets.s3_server import S3Server, s3_server
from tests.making.model_runs import make_run
from tests.making.warm.python import start_with_pipes
from tests.promotion.test_champion_line import DAMAGE

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
ANNA = Actor("anna")
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("one", "two", "three")
_places = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environ.items():
            patch.setenv(name, value)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield running


@pytest.fixture(params=["s3", "s3 without conditions", "file"])
def place(
    request: pytest.FixtureRequest, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A URL with nothing there, and this machine's own cache."""
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "one"))
    monkeypatch.setattr(versions, "_tried", {})
    server.control(knows_conditions=request.param == "s3")
    number = next(_places)
    yield (
        (tmp_path / "bucket").as_uri() if request.param == "file" else f"s3://tuneproof/place-{number}/models"
    )
    server.control(knows_conditions=True)


@pytest.fixture
def s3_place(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "one"))
    return f"s3://tuneproof/place-{next(_places)}/models"


@pytest.fixture(scope="module")
def promoted_in_turn(
    server: S3Server, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Path, list[dict[str, bytes]]]:
    """Three models at a URL, the cache of the machine that sent them, and the alias after each was promoted."""
    cache, states = tmp_path_factory.mktemp("sender"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEPROOF_CACHE", str(cache))
        models = with_models(f"s3://tuneproof/place-{next(_places)}/models", tiny_model_dir)
        for name in NAMES:
            force(models, name)
            states.append({name: models.read(name) or b"" for name in (POINTER_NAME, HISTORY_NAME)})
    return models, cache, states


@pytest.fixture
def promoted(
    promoted_in_turn: tuple[Store, Path, list[dict[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Store]:
    """Three models at a URL as they were after the first of them were promoted, as many as one asks for."""
    models, cache, states = promoted_in_turn
    monkeypatch.setenv("TUNEPROOF_CACHE", str(cache))

    def after(count: int) -> Store:
        for name in models.files_below(""):
            models.remove(name)
        for name, content in states[count - 1].items():
            models.write(name, content)
        return models

    return after


def with_models(place: str, base: Path, names: tuple[str, ...] = NAMES) -> Store:
    models = Store(place)
    for name in names:
        send_model(models, make_run(models.local, name, base=base))
    return models


def force(models: Store | Path, name: str) -> None:
    promote(models, name, Actor("anna", "because"), None, force=True)


def told_of(models: Store | Path) -> list[tuple[str, str, str | None]]:
    return [(one.action, one.promotion.run_name, one.replaced) for one in promotion_history(models)]


def marks(models: Store) -> list[str]:
    return [name for name in models.files_below("") if name.startswith(".promotion.unfinished")]


def test_promotions_and_rollbacks_at_a_url_leave_what_they_leave_in_a_folder(
    place: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    there, here = with_models(place, tiny_model_dir), tmp_path / "models"
    for name in NAMES:
        make_run(here, name, base=tiny_model_dir)
    for models in (there, here):
        for name in NAMES:
            force(models, name)
        force(models, "three")  # is promoted already
        assert roll_back(models, ANNA)[0].run_name == "two"
        force(models, "three")
        assert [roll_back(models, ANNA)[0].run_name for _ in range(2)] == ["two", "one"]
        with pytest.raises(PromotionError, match="one is the first promoted model"):
            roll_back(models, ANNA)
    assert told_of(there) == told_of(here)
    line = alias.read_line(there)
    assert line.pointer == line.decided and line.mark is None and not marks(there)
    written = json.loads(there.read("promoted.json") or b"")
    assert written.pop("change_id") == line.history.changes[-1].change_id
    assert written == line.pointer


def test_another_machine_sees_and_goes_on_with_what_one_has_promoted(
    place: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = with_models(place, tiny_model_dir)
    force(models, "one")
    force(models, "two")
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "another"))
    assert promoted_run(models) == "two"
    found = find_model(model="promoted", hf_user_id=None, models_dir=models).chosen
    assert found.model_id == str(models.local / "two")
    assert (models.local / "two" / "adapter_model.safetensors").is_file()
    assert roll_back(models, ANNA)[0].run_name == "one"


def test_a_store_is_tried_before_its_conditions_are_relied_on(
    server: S3Server, s3_place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for knows in (True, False):
        monkeypatch.setattr(versions, "_tried", {})
        server.control(knows_conditions=knows)
        assert has_conditional_writes(Store(s3_place)) is knows
    server.control(knows_conditions=True)


def test_a_file_is_replaced_only_where_it_is_the_version_that_was_read(place: str) -> None:
    store = Store(place)
    nothing = read_version(store, "a/b.json")
    assert nothing == Version()
    assert replace_version(store, "a/b.json", b"first", nothing)
    assert not replace_version(store, "a/b.json", b"second", nothing)
    first = read_version(store, "a/b.json")
    assert replace_version(store, "a/b.json", b"third", first)
    assert not replace_version(store, "a/b.json", b"fourth", first)
    assert read_version(store, "a/b.json").content == b"third"
    store.remove("a/b.json")
    assert not replace_version(store, "a/b.json", b"fifth", first)


def test_a_write_whose_answer_was_lost_counts_as_written(server: S3Server, s3_place: str) -> None:
    store = Store(s3_place)
    assert replace_version(store, "x", b"0", Version())
    lost = 0
    for number in range(1, 12):
        before = read_version(store, "x")
        server.control(rate=0.5, seed=number, reset=True)
        try:
            written = replace_version(store, "x", b"%d" % number, before)
        except StorageError:
            written = None
        lost += server.control(rate=0).get("failed after", 0)
        holds = read_version(store, "x").content == b"%d" % number
        assert written is None or written == holds
    assert lost


# --- two at once


def _together(place: str, caches: Path, plans: list[list[str]]) -> list[dict[str, Any]]:
    """Let machines, each with a cache of its own, change the alias at once; give how each step ended."""
    arguments = ["-m", "tests.making.buckets.promotions", place, str(caches), *map(",".join, plans)]
    program, wanted, printed = start_with_pipes(arguments, env=os.environ, cwd=ROOT)
    with wanted, printed:
        ended = [json.loads(line) for line in printed]
    assert program.wait(180) == 0
    return ended


def test_of_machines_that_promote_at_once_each_change_holds_or_is_refused_and_none_is_lost(
    place: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    models = with_models(place, tiny_model_dir)
    force(models, "one")
    plans = [["two", "three", "rollback"], ["three", "one", "two"], ["two", "one", "rollback"]]
    ended = _together(place, tmp_path, plans)
    entries = promotion_history(models)
    done = [one for one in ended if one["told"] is None]
    refused = [one["told"] for one in ended if one["told"] is not None]
    assert all(
        "at the same moment" in told or "another promotion" in told or "first promoted" in told
        for told in refused
    )
    # A step that finds its model promoted already, or tells of a rollback that is told, adds no line.
    assert 1 < len(entries) <= 1 + len(done)
    assert len({change.change_id for change in alias.read_line(models).history.changes}) == len(entries)
    for before, after in itertools.pairwise(entries):
        assert after.replaced == before.promotion.run_name
    line = alias.read_line(models)
    assert line.pointer == line.decided and promoted_run(models) == entries[-1].promotion.run_name
    assert not marks(models)


def test_of_two_promotions_at_the_same_moment_one_holds_and_the_other_is_told(
    promoted: Callable[[int], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = promoted(1)
    add_line = BucketAlias.add_line

    def add_too_late(files: BucketAlias, *args: Any, **options: Any) -> None:
        """Another machine promotes between this one's reading and its line."""
        monkeypatch.setattr(BucketAlias, "add_line", add_line)
        held = BucketAlias.changing
        monkeypatch.setattr(BucketAlias, "changing", lambda files, _: __import__("contextlib").nullcontext())
        force(models, "two")
        monkeypatch.setattr(BucketAlias, "changing", held)
        add_line(files, *args, **options)

    monkeypatch.setattr(BucketAlias, "add_line", add_too_late)
    with pytest.raises(PromotionError, match="at the same moment: two is promoted now"):
        force(models, "three")
    assert told_of(models) == [("promote", "one", None), ("promote", "two", "one")]
    assert promoted_run(models) == "two" and not marks(models)


# --- cut off


STEPS = ("write_mark", "add_line", "write_pointer", "sweep", "remove_mark")


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_change_that_dies_at_any_step_is_finished_or_never_was(
    promoted: Callable[[int], Store], monkeypatch: pytest.MonkeyPatch, step: str, is_done: bool
) -> None:
    class Killed(BaseException):
        pass

    models = promoted(1)
    plain = getattr(BucketAlias, step)

    def die(files: BucketAlias, *args: Any, **options: Any) -> None:
        if is_done:
            plain(files, *args, **options)
        raise Killed

    with monkeypatch.context() as broken, pytest.raises(Killed):
        broken.setattr(BucketAlias, step, die)
        force(models, "two")
    is_decided = STEPS.index(step) > 1 or (step == "add_line" and is_done)
    champion = current_champion(models)
    assert champion is not None and champion.run_name == ("two" if is_decided else "one")
    line = alias.read_line(models)
    assert line.pointer == line.decided
    force(models, "two")
    assert told_of(models) == [("promote", "one", None), ("promote", "two", "one")]
    force(models, "three")
    assert not marks(models), "nothing is left of changes that were cut off"


def test_a_rollback_that_nobody_was_told_of_is_told_and_not_repeated(
    place: str, tiny_model_dir: Path
) -> None:
    models = with_models(place, tiny_model_dir)
    for name in NAMES:
        force(models, name)
    with pytest.raises(ZeroDivisionError):
        roll_back(models, ANNA, lambda *_: print(1 / 0))
    heard: list[bool] = []
    assert roll_back(models, ANNA, lambda *told: heard.append(told[2]))[0].run_name == "two"
    assert heard == [True]
    assert roll_back(models, ANNA)[0].run_name == "one"


def test_a_machine_that_stood_still_cannot_put_an_old_pointer_back(
    promoted: Callable[[int], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = promoted(1)
    write_pointer, late = BucketAlias.write_pointer, []

    def stand_still(files: BucketAlias, content: bytes, before: Version) -> None:
        late.append((content, before))
        raise OvertakenError  # ends here, whatever it is taken for

    with monkeypatch.context() as broken, pytest.raises(PromotionError):
        broken.setattr(BucketAlias, "write_pointer", stand_still)
        force(models, "two")
    # The mark was taken away by that machine's own end; put what holds in order, as a person would.
    force(models, "two")
    roll_back(models, ANNA)
    assert promoted_run(models) == "one"
    write_pointer(BucketAlias(models), *late[0])  # it wakes up
    assert promoted_run(models) == "one"


def test_while_the_bucket_does_not_answer_nothing_changes_and_that_is_told(
    server: S3Server, promoted: Callable[[int], Store]
) -> None:
    models = promoted(1)
    server.control(rate=1.0)
    try:
        with pytest.raises(StorageError, match="cannot be"):
            force(models, "two")
        with pytest.raises(StorageError, match="cannot be"):
            promoted_run(models)
    finally:
        server.control(rate=0)
    assert promoted_run(models) == "one"


def test_requests_that_fail_at_random_leave_pointer_and_history_equal(
    server: S3Server, promoted: Callable[[int], Store]
) -> None:
    models = promoted(1)
    for number in range(12):
        before, name = told_of(models), NAMES[(number + 1) % 3]
        server.control(rate=0.15, seed=number)
        try:
            if number % 4 == 3:
                roll_back(models, ANNA)
            else:
                force(models, name)
        except (StorageError, PromotionError):
            pass
        finally:
            server.control(rate=0)
        current_champion(models)
        line = alias.read_line(models)
        assert line.pointer == line.decided
        assert told_of(models)[: len(before)] == before and len(told_of(models)) <= len(before) + 1


# --- what is refused


def test_a_model_that_was_not_sent_whole_cannot_be_promoted(place: str, tiny_model_dir: Path) -> None:
    models = with_models(place, tiny_model_dir)
    force(models, "one")
    models.remove("two/adapter_model.safetensors")
    models.remove("three/tuneproof_manifest.json")
    for name in ("two", "three"):
        with pytest.raises(PromotionError, match=f"{name} cannot be promoted"):
            force(models, name)
    unsent = make_run(models.local, "unsent", base=tiny_model_dir)
    models.push([unsent / "tuneproof_manifest.json"])
    with pytest.raises(PromotionError, match=r"unsent cannot be promoted: .*was not sent there"):
        force(models, "unsent")
    with pytest.raises(ConfigError, match="not allowed"):
        force(models, "../one")
    with pytest.raises(ConfigError, match="reserved"):
        force(models, "promoted")
    assert promoted_run(models) == "one"


def test_a_champion_whose_files_changed_at_the_url_answers_nothing(place: str, tiny_model_dir: Path) -> None:
    models = with_models(place, tiny_model_dir)
    force(models, "one")
    content = models.read("one/adapter_model.safetensors") or b""
    models.write("one/adapter_model.safetensors", content[:-1] + b"\x01")
    with pytest.raises(ModelLoadError, match="the files of the promoted model one have changed"):
        find_model(model="promoted", hf_user_id=None, models_dir=models)
    force(models, "two")
    with pytest.raises(PromotionError, match="the files of one have changed since it was promoted"):
        roll_back(models, ANNA)


SOME_DAMAGE = (
    "a NUL block", "a line that is gone", "the last line gone", "the last line changed", "no history", "no pointer",
    "a pointer of zeros", "another pointer",
)  # fmt: skip


@pytest.mark.parametrize("kind", SOME_DAMAGE)
def test_damage_of_pointer_or_history_is_refused_as_in_a_folder_and_mended_by_force(
    promoted: Callable[[int], Store], tmp_path: Path, kind: str
) -> None:
    models, copy = promoted(3), tmp_path / "copy"
    copy.mkdir()
    files = (POINTER_NAME, HISTORY_NAME)
    for name in files:
        (copy / name).write_bytes(models.read(name) or b"")
    damage, told = DAMAGE[kind]
    damage(copy)
    for name in files:
        if (copy / name).exists():
            models.write(name, (copy / name).read_bytes())
        else:
            models.remove(name)
    uses: list[Callable[[], object]] = [
        lambda: roll_back(models, ANNA),
        lambda: promoted_run(models),
        lambda: find_model(model="promoted", hf_user_id=None, models_dir=models),
        lambda: current_promotion(models),
    ]
    for use in uses:
        with pytest.raises(ModelLoadError, match=told):
            use()
    damaged = models.read("promotions.jsonl") or b""
    force(models, "two")
    assert promoted_run(models) == "two"
    kept = [
        models.read(name) or b"" for name in models.files_below("") if name.startswith("promotions.jsonl")
    ]
    assert any(content.startswith(damaged[: damaged.rfind(b"\n") + 1]) for content in kept)


# --- lists and commands


def test_models_at_a_url_are_listed_with_what_is_missing_and_none_is_brought(
    place: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = with_models(place, tiny_model_dir)
    models.remove("two/adapter_model.safetensors")
    models.write("busy/checkpoints/checkpoint-2/complete.json", b"{}")
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "another"))
    reasons = {entry.run_name: entry.reason for entry in list_models(models)}
    assert reasons.pop("one") is None and reasons.pop("three") is None
    assert "has no weights" in str(reasons["two"]) and "training is still going on" in str(reasons["busy"])
    assert not [path for path in models.local.rglob("*") if path.suffix == ".safetensors"]
    found = find_model(model=None, hf_user_id=None, models_dir=models)
    assert Path(found.chosen.model_id).name == "three"
    assert {"training is still going on" in one.reason for one in found.rejected} == {True, False}


def test_runs_at_a_url_are_those_that_are_there_now_with_their_state(
    s3_place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Store(f"{s3_place}-runs")
    for name in (
        "begun/identity.json",
        "begun/ledgers/run/a/0-9.jsonl",
        "empty/identity.json",
        "gone/identity.json",
    ):
        runs.write(name, b"{}")
    places = (f"--pipeline.models_dir={s3_place}", f"--pipeline.runs_dir={runs.place}")
    assert main(["runs", *places]) == 0
    assert "gone" in capsys.readouterr().out
    runs.remove("gone/identity.json")
    assert main(["runs", *places]) == 0
    shown = capsys.readouterr().out
    assert "gone" not in shown and "no answers" in shown and "unfinished; the same command resumes" in shown


def test_commands_list_promote_and_roll_back_at_a_url(
    s3_place: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with_models(s3_place, tiny_model_dir)
    places = (f"--pipeline.models_dir={s3_place}", f"--pipeline.runs_dir={s3_place}-runs")
    for name in ("one", "two"):
        assert main(["promote", name, "--force", "--reason", "better", *places]) == 0
    assert main(["rollback", *places]) == 0
    assert main(["models", *places]) == 0
    assert main(["models", "--history", *places]) == 0
    assert main(["runs", *places]) == 0
    shown = capsys.readouterr().out
    assert "promoted again: one, in place of two." in shown and "complete, promoted" in shown
    assert f"Promotions in {s3_place}" in shown and "rollback" in shown


# --- the book of challenges


def look(candidate: str) -> Look:
    return Look(
        at="2026-01-01T00:00:00+00:00", opponent="o", opponent_run="base", candidate=candidate,
        candidate_run=candidate, row_count=2, rows=("a", "b"), metric="exact_match", difference=0.1,
        standard_error=0.05, p_value=0.04,
    )  # fmt: skip


def test_the_book_of_challenges_at_a_url_counts_those_of_every_machine(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, replaced = ChallengeBook(Store(place)), replace_version
    assert book.enter(look("one"))[0] == 1

    def replace_too_late(*args: Any) -> bool:
        """Another machine enters its look between this one's reading and writing."""
        monkeypatch.setattr(nights, "replace_version", replaced)
        monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "two"))
        assert book.enter(look("two"))[0] == 2
        monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "one"))
        return replaced(*args)

    monkeypatch.setattr(nights, "replace_version", replace_too_late)
    number, looks = book.enter(look("three"))
    assert (number, [one.candidate for one in looks]) == (3, ["one", "two", "three"])
    assert book.enter(look("two"))[0] == 2
    book.check()


def test_a_damaged_book_of_challenges_at_a_url_is_refused(s3_place: str) -> None:
    models = Store(s3_place)
    book = ChallengeBook(models)
    for name in NAMES:
        book.enter(look(name))
    whole = models.read("challenges.jsonl") or b""
    lines = whole.splitlines(keepends=True)
    for content, told in (
        (b"".join([lines[0], lines[2]]), "the line before line 2 is gone"),
        (b"".join(lines[:2]), "line 3 is gone"),
        (b"x" + whole, "line 1 is damaged"),
    ):
        models.write("challenges.jsonl", content)
        for use in (book.check, lambda: book.enter(look("four"))):
            with pytest.raises(EvaluationError, match=told):
                use()
