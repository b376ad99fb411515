"""The registry: run names, manifests written whole and last, and what counts as complete."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.core.config import FineTunerConfig
from tasks.core.errors import ConfigError, ModelLoadError, ModelNotFoundError, StorageError
from tasks.core.files import write_atomically
from tasks.core.models.trained import registry
from tests.making.model_runs import make_run, manifest_of

# --- run names


@pytest.mark.parametrize("name", ["a", "llama-3.2-1b", "2026-01-01", "A_b.c-d", "x" * 100])
def test_plain_run_names_are_taken(name: str, tmp_path: Path) -> None:
    assert registry.model_dir(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "a/../b", "a/b", "a\\b", "/etc/passwd", "~root", "-rf", ".hidden", "a..b"),
        *("a b", "a\nb", "a\0b", "x" * 101, "ä", "user/name", "C:\\x", "name\n"),
    ],
)
def test_run_names_that_could_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        registry.model_dir(tmp_path, name)


@given(st.text(max_size=130))
@example("a/../../b")
def test_any_text_is_either_refused_or_names_a_direct_child(name: str) -> None:
    models_dir = Path("/models")
    try:
        directory = registry.model_dir(models_dir, name)
    except ConfigError as error:
        suggestion = str(error.next_step).split("'")
        assert "reserved" in error.what or registry.check_run_name(suggestion[1])
    else:
        assert Path(os.path.normpath(directory)).parent == models_dir


@pytest.mark.parametrize(
    "name",
    [
        *("promoted", "Promoted", "promoted.json", "promotions.jsonl", "promotions.jsonl.damaged-1"),
        *("challenges.jsonl", "leaderboard.html", "con", "NUL", "Aux.txt", "com1", "lpt9.v2", "prn"),
    ],
)
def test_names_that_belong_to_something_else_are_reserved(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reserved") as caught:
        registry.model_dir(tmp_path, name)
    assert registry.check_run_name(str(caught.value.next_step).split("'")[1])
    with pytest.raises(ValueError, match="reserved"):
        FineTunerConfig(run_name=name)


@pytest.mark.parametrize("name", ["console", "com10", "my-nul", "promoted-2", "auxiliary.v1", "promotions"])
def test_names_that_only_look_like_reserved_ones_are_taken(name: str, tmp_path: Path) -> None:
    assert registry.model_dir(tmp_path, name) == tmp_path / name
    assert FineTunerConfig(run_name=name).run_name == name


def test_a_name_that_ends_with_a_dot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends with '\.'"):
        registry.model_dir(tmp_path, "run.")


def test_a_name_that_is_made_up_is_never_reserved() -> None:
    for name in ("con", "org/NUL", "aux.v2.gguf", "com1.jsonl"):
        assert registry.made_up_name(f"{registry.slug(name)}-{registry.data_slug('x.jsonl')}", "", "")
        assert registry.check_run_name(registry.slug(name))


def test_a_link_that_leads_elsewhere_is_not_written_through(tmp_path: Path) -> None:
    models_dir, outside = tmp_path / "models", tmp_path / "outside"
    models_dir.mkdir()
    outside.mkdir()
    (models_dir / "linked").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"linked is a link to .*outside"):
        registry.model_dir(models_dir, "linked")


def test_a_models_dir_that_is_a_link_itself_is_fine(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "big-disk")
    assert registry.model_dir(tmp_path / "models", "run") == tmp_path / "models" / "run"


# --- manifests


def test_a_manifest_reads_back_as_written(tmp_path: Path) -> None:
    manifest = manifest_of("run-1")
    registry.write_manifest(tmp_path, manifest)
    assert registry.read_manifest(tmp_path) == manifest


def test_a_missing_and_a_damaged_manifest_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no complete fine-tuned model"):
        registry.read_manifest(tmp_path)
    with pytest.raises(ModelNotFoundError):
        registry.read_manifest(tmp_path / "absent")
    (tmp_path / registry.MANIFEST_NAME).write_text('{"run_name": "x"')
    with pytest.raises(ModelLoadError, match=r"tuneproof_manifest\.json cannot be read"):
        registry.read_manifest(tmp_path)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = registry.write_manifest(tmp_path, manifest_of("old"))
    before = path.read_bytes()
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from tests.making.model_runs import manifest_of\n"
        "from tasks.core.models.trained.registry import write_manifest\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"  # the disk is full after 100 bytes
        f"write_manifest(Path({str(tmp_path)!r}), manifest_of('new'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "StorageError" in done.stderr
    assert "cannot be written" in done.stderr
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "below", "text")


def _write_for_ever(path: Path) -> None:
    for number in range(1_000_000):
        write_atomically(path, f"{number % 10}" * 200_000)


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "0" * 200_000)
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=_write_for_ever, args=(path,))
    writer.start()
    seen: set[str] = set()
    deadline = time.monotonic() + 30
    while len(seen) < 4 and time.monotonic() < deadline:
        text = path.read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1  # never a mixture of two writings
        seen.add(text[0])
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert len(seen) == 4
    assert len(set(path.read_text())) == 1


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# --- what is there


def test_no_models_directory_means_no_models(tmp_path: Path) -> None:
    assert registry.list_models(tmp_path / "absent") == []


def test_models_are_listed_newest_first_by_the_end_of_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_run(tmp_path, "old", base=tiny_model_dir, finished_at="2026-01-01T00:00:00+00:00")
    make_run(tmp_path, "new", base=tiny_model_dir, finished_at="2026-01-03T00:00:00+00:00")
    make_run(tmp_path, "middle", base=tiny_model_dir, finished_at="2026-01-02T23:00:00-05:00")
    make_run(tmp_path, "no-zone", base=tiny_model_dir, finished_at="2025-06-01T00:00:00")
    entries = registry.list_models(tmp_path)
    assert [entry.run_name for entry in entries] == ["middle", "new", "old", "no-zone"]
    assert all(entry.complete for entry in entries)
    assert entries[0].manifest == registry.read_manifest(tmp_path / "middle")


def test_each_incomplete_model_says_why(tiny_model_dir: Path, tmp_path: Path) -> None:
    make_run(tmp_path, "training", base=tiny_model_dir, finished_at=None)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path, "no-base", base="/nowhere/base")
    make_run(tmp_path, "no-package", base="package:not_there/model.gguf")
    make_run(tmp_path, "uncached", base="someone/base-7b")
    (make_run(tmp_path, "no-weights", base=tiny_model_dir) / "adapter_model.safetensors").unlink()
    (make_run(tmp_path, "no-config", base=tiny_model_dir) / "adapter_config.json").unlink()
    (make_run(tmp_path, "damaged", base=tiny_model_dir) / registry.MANIFEST_NAME).write_text("{}")
    (tmp_path / "a-file").write_text("not a model")
    reasons = {entry.run_name: entry.reason for entry in registry.list_models(tmp_path)}
    assert "training is still going on or was interrupted" in str(reasons.pop("training"))
    assert reasons.pop("empty") == "no tuneproof_manifest.json"
    assert reasons.pop("no-base") == "it is an adapter and its base /nowhere/base is missing"
    assert "package:not_there/model.gguf is missing" in str(reasons.pop("no-package"))
    assert "someone/base-7b is missing" in str(reasons.pop("uncached"))  # the Hub may not be asked here
    assert "has no weights" in str(reasons.pop("no-weights"))
    assert reasons.pop("no-config") == "neither config.json nor adapter_config.json"
    assert "cannot be read" in str(reasons.pop("damaged"))
    assert reasons == {}


def test_listing_models_loads_no_torch_and_no_transformers(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_run(tmp_path, "run", base=tiny_model_dir)
    script = (
        "import sys\nfrom pathlib import Path\nfrom tasks.core.models.trained import registry\n"
        f"assert registry.list_models(Path({str(tmp_path)!r}))[0].complete\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'prefect') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the promoted one


def test_the_promoted_run_is_read_from_a_pointer_file_or_a_link(tmp_path: Path) -> None:
    assert registry.promoted_run(tmp_path) is None
    (tmp_path / "run-1").mkdir()
    (tmp_path / "promoted").symlink_to("run-1")
    assert registry.promoted_run(tmp_path) == "run-1"
    (tmp_path / "promoted.json").write_text('{"run_name": "run-2"}')
    assert registry.promoted_run(tmp_path) == "run-2"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_name": "../../etc"}'])
def test_a_damaged_pointer_is_an_error_not_a_guess(tmp_path: Path, text: str) -> None:
    (tmp_path / "promoted.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"promoted\.json names no run"):
        registry.promoted_run(tmp_path)


# --- names that are shortened


def test_long_names_that_differ_anywhere_stay_different_when_they_are_shortened() -> None:
    base = "smollm2-135m-instruct-of-our-own-with-a-long-name"
    names = [f"{base}-20261127-0405{second:02d}" for second in range(60)]
    names += [f"a-{base}-20261127-040506", f"{base[:20]}x{base[20:]}-20261127-040506"]
    slugs = {registry.slug(name) for name in names}
    assert len(slugs) == len(names)
    assert all(len(slug) <= 36 and registry.check_run_name(slug) for slug in slugs)
    assert registry.slug(names[7]).endswith("-20261127-040507")


def test_short_names_are_not_changed() -> None:
    assert registry.slug("models/SmolLM2-135M-Instruct.Q4_1.gguf") == "smollm2-135m-instruct.q4_1"
    assert registry.made_up_name("model-data", "p-", "-s") == "p-model-data-s"


def test_a_made_up_name_makes_room_for_prefix_and_suffix() -> None:
    made = registry.made_up_name("m" * 36 + "-" + "d" * 36 + "-0123abcd", "p" * 40, "-s")
    assert len(made) <= 100
    assert made.startswith("p" * 40 + "m") and made.endswith("-0123abcd-s")
    with pytest.raises(ConfigError, match="is not allowed"):
        registry.made_up_name("model-data", "p" * 95, "")
