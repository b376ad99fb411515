"""Discovery: the order of the search, the reasons, and errors that name what was searched."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from tasks.core.errors import ModelNotFoundError
from tasks.core.models.trained.discovery import Discovery, discover_model
from tasks.core.models.trained.registry import moment_after_all, write_manifest
from tests.making.fake_hub import serve
from tests.making.model_runs import make_run, manifest_of


def discover(
    models_dir: Path, *, model: str | None = None, run_names: tuple[str, ...] = (), user: str | None = None
) -> Discovery:
    return discover_model(model=model, run_names=run_names, hf_user_id=user, models_dir=models_dir)


def reasons(discovery: Discovery) -> dict[str, str]:
    return {Path(rejection.model_id).name: rejection.reason for rejection in discovery.rejected}


@pytest.fixture
def models_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Three runs: an old complete one, a newer complete one, and the newest, still in training."""
    directory = tmp_path / "models"
    make_run(directory, "arithmetic-1", base=tiny_model_dir, finished_at="2026-01-01T00:00:00+00:00")
    make_run(directory, "arithmetic-2", base=tiny_model_dir, finished_at="2026-01-02T00:00:00+00:00")
    make_run(directory, "arithmetic-3", base=tiny_model_dir, finished_at=None)
    return directory


# --- named


def test_a_path_is_taken_as_it_is(tiny_model_dir: Path, models_dir: Path) -> None:
    chosen = discover(models_dir, model=str(tiny_model_dir)).chosen
    assert (chosen.model_id, chosen.source) == (str(tiny_model_dir), "explicit")


@pytest.mark.parametrize("form", ["name", "path"])
def test_a_run_is_found_by_its_name_and_by_its_path(models_dir: Path, form: str) -> None:
    wanted = "arithmetic-1" if form == "name" else str(models_dir / "arithmetic-1")
    assert discover(models_dir, model=wanted).chosen.model_id == str(models_dir / "arithmetic-1")


def test_a_packaged_model_must_be_installed(models_dir: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="package not_there is not installed"):
        discover(models_dir, model="package:not_there/model.gguf")


def test_a_named_model_that_is_unusable_is_never_replaced_by_another(models_dir: Path) -> None:
    for wanted in ("arithmetic-3", str(models_dir / "arithmetic-3")):
        with pytest.raises(ModelNotFoundError, match="training is still going on or was interrupted"):
            discover(models_dir, model=wanted)


def test_a_misspelt_name_error_gives_the_nearest_run_and_all_places_searched(models_dir: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        discover(models_dir, model="arithmatic-2")
    assert "no usable model 'arithmatic-2'" in caught.value.what
    assert f"{models_dir / 'arithmatic-2'}: no such directory" in caught.value.what
    assert "on the Hub: not in the local cache" in caught.value.what
    assert "did you mean arithmetic-2" in str(caught.value.next_step)


def test_a_name_like_nothing_there_lists_the_runs(models_dir: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"runs in .*: arithmetic-3, arithmetic-2, arithmetic-1"):
        discover(models_dir, model="/nowhere/zzz")


@pytest.mark.parametrize("wanted", ["../../etc", "a/../../b", "..", "models/../../x", "\0", "a b/c"])
def test_hostile_names_are_only_not_found(models_dir: Path, wanted: str) -> None:
    with pytest.raises(ModelNotFoundError):
        discover(models_dir, model=wanted)


def test_an_adapter_whose_base_is_missing_is_refused_with_the_bases_name(models_dir: Path) -> None:
    make_run(models_dir, "orphan", base="/nowhere/base-7b")
    with pytest.raises(ModelNotFoundError, match="base /nowhere/base-7b is missing"):
        discover(models_dir, model="orphan")


def test_the_model_that_ended_last_is_the_newest_though_the_clock_went_back(
    models_dir: Path, tiny_model_dir: Path
) -> None:
    for name, finished_at in (("arithmetic-4", "2020-01-01T00:00:00+00:00"), ("arithmetic-5", "2019-01-01")):
        ordered_at = moment_after_all(models_dir, finished_at)
        directory = make_run(models_dir, name, base=tiny_model_dir)
        write_manifest(directory, manifest_of(name, finished_at=finished_at, ordered_at=ordered_at))
        assert discover(models_dir).chosen.model_id == str(directory)
    assert moment_after_all(models_dir, "2026-03-01T00:00:00+00:00") == "2026-03-01T00:00:00+00:00"


# --- promoted


def test_promoted_follows_the_pointer_and_not_the_newest(models_dir: Path) -> None:
    (models_dir / "promoted.json").write_text('{"run_name": "arithmetic-1"}')
    chosen = discover(models_dir, model="promoted").chosen
    assert (chosen.model_id, chosen.source) == (str(models_dir / "arithmetic-1"), "promoted")


def test_promoted_without_a_promotion_or_with_a_lost_model_says_so(models_dir: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model has been promoted yet"):
        discover(models_dir, model="promoted")
    (models_dir / "promoted.json").write_text('{"run_name": "arithmetic-1"}')
    shutil.rmtree(models_dir / "arithmetic-1")
    with pytest.raises(ModelNotFoundError, match="promoted, but its directory is gone"):
        discover(models_dir, model="promoted")


# --- not named


def test_without_a_name_the_newest_complete_model_wins_and_the_others_say_why_not(models_dir: Path) -> None:
    make_run(models_dir, "orphan", base="/nowhere/base", finished_at="2026-01-09T00:00:00+00:00")
    found = discover(models_dir)
    assert found.chosen.model_id == str(models_dir / "arithmetic-2")
    assert found.chosen.source == "newest local"
    why = reasons(found)
    assert "still going on" in why["arithmetic-3"]
    assert why["arithmetic-1"] == "complete, but older than the chosen one"
    assert "/nowhere/base is missing" in why["orphan"]


def test_a_run_name_wins_over_a_newer_model(models_dir: Path) -> None:
    chosen = discover(models_dir, run_names=("arithmetic-1",), user="anna").chosen
    assert (chosen.model_id, chosen.source) == (str(models_dir / "arithmetic-1"), "local run")


def test_the_first_run_name_that_is_there_wins_without_a_warning(
    models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = discover(models_dir, run_names=("a-arithmetic-1-b", "arithmetic-1"))
    assert found.chosen.model_id == str(models_dir / "arithmetic-1")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_name_that_names_no_model_falls_back_to_the_newest_and_says_so(
    models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = discover(models_dir, run_names=("my-inference-run",), user="anna")
    assert found.chosen.model_id == str(models_dir / "arithmetic-2")
    assert reasons(found)["my-inference-run"] == "no such directory"
    assert "no model is called my-inference-run; " in caplog.text
    assert any("anna/my-inference-run on the Hub" in rejection.model_id for rejection in found.rejected)


def test_nothing_anywhere_names_every_place_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        discover(tmp_path / "models", user="anna")
    assert f"{tmp_path / 'models'}: holds no fine-tuned model" in caught.value.what
    assert "models of anna on the Hub: not searched: HF_HUB_OFFLINE" in caught.value.what
    assert "tuneproof finetune" in str(caught.value.next_step)


# --- Hub


def test_the_hub_is_asked_in_the_order_run_then_newest(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_local = tmp_path / "models"
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with serve(tmp_path, monkeypatch) as hub:
        first_commit = hub.add("anna/first", tiny_model_dir)
        second_commit = hub.add("anna/second", tiny_model_dir)
        hub.add("anna/third", pickled)
        hub.add("ben/other", tiny_model_dir)
        by_run = discover(nothing_local, run_names=("first",), user="anna")
        newest = discover(nothing_local, user="anna")
        explicit = discover(nothing_local, model="ben/other")
    assert (by_run.chosen.model_id, by_run.chosen.revision) == ("anna/first", first_commit)
    assert by_run.chosen.source == "hub run"
    assert (newest.chosen.model_id, newest.chosen.revision) == ("anna/second", second_commit)
    assert reasons(newest)["third on the Hub"] == "no safetensors weights"
    assert explicit.chosen.model_id == "ben/other"


def test_a_local_model_is_preferred_to_the_hubs_newest(
    models_dir: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, monkeypatch) as hub:
        hub.add("anna/first", tiny_model_dir)
        assert discover(models_dir, user="anna").chosen.source == "newest local"
        assert hub.log == []  # nothing was asked


def test_an_unknown_hub_model_is_not_found(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        serve(tmp_path, monkeypatch),
        pytest.raises(ModelNotFoundError, match="does not exist, or HF_TOKEN"),
    ):
        discover(models_dir, model="anna/nothing")


def test_a_silent_hub_leaves_what_is_cached(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.core.models.locating import locate

    with serve(tmp_path, monkeypatch) as hub:
        hub.add("anna/first", tiny_model_dir)
        locate("anna/first")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # it tries five times
    found = discover(tmp_path / "models", model="anna/first")  # the port is now closed
    assert "local cache" in found.chosen.reason
    with pytest.raises(ModelNotFoundError, match="the Hub did not answer"):
        discover(tmp_path / "models", user="anna")
