"""Packaged models: a real GGUF file inside a real package, converted once, whatever happens meanwhile."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tasks.core.errors import ModelLoadError, ModelNotFoundError
from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer
from tasks.core.models.packaged import find_packaged_file, package_model_dir
from tests.making.tiny_gguf import write_tiny_gguf
from tests.making.warm.python import run_python

NAME = "package:tiny_package/tiny.gguf"


@pytest.fixture(scope="session")
def package_root(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    root = tmp_path_factory.mktemp("site-packages")
    (root / "tiny_package").mkdir()
    # Importing it fails: a model's package must be found without running its code.
    (root / "tiny_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    write_tiny_gguf(tiny_model, tiny_tokenizer, root / "tiny_package" / "tiny.gguf")
    return root


@pytest.fixture(autouse=True)
def cache_dir(package_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(package_root)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package_root), str(Path.cwd())]))
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.rglob("*.partial-*"))


def test_a_packaged_model_answers_as_the_model_it_was_made_from(tiny_model: Any, tiny_tokenizer: Any) -> None:
    loaded = load_model_and_tokenizer(ModelSpec(NAME, dtype="float32", device="cpu"))
    ids = torch.tensor([tiny_tokenizer.encode("Anna has 3 apples")])
    plain, packaged = tiny_model(ids).logits, loaded.model(ids).logits
    assert (
        torch.nn.functional.cosine_similarity(plain, packaged, dim=-1).min() > 0.999
    )  # bfloat16 between them
    assert loaded.identity.model_id == NAME
    assert loaded.tokenizer.chat_template == tiny_tokenizer.chat_template
    assert len(loaded.tokenizer) == len(tiny_tokenizer)
    assert loaded.model.config.name_or_path == NAME  # what an adapter trained on it will name as its base


def test_the_second_load_does_not_convert_again() -> None:
    weights_path = package_model_dir(NAME) / "model.safetensors"
    before = weights_path.stat()
    assert package_model_dir(NAME) == weights_path.parent
    after = weights_path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_two_processes_convert_once_between_them(cache_dir: Path) -> None:
    script = f"from tasks.core.models.packaged import package_model_dir\nprint(package_model_dir({NAME!r}))"
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: run_python(["-c", script], check=True).stdout, range(2))
    assert first == second != ""
    assert len(list(cache_dir.rglob("model.safetensors"))) == 1
    assert leftovers(cache_dir) == []


def test_each_process_of_a_group_converts_for_the_cache_of_its_own_machine(tmp_path: Path) -> None:
    def convert(rank: int) -> str:
        script = (
            "import os\nfrom torch import distributed\nfrom tasks.core.models.packaged import package_model_dir\n"
            f"os.environ['TUNEPROOF_CACHE'] = {str(tmp_path / f'machine-{rank}')!r}\n"
            f"meeting = 'file://{tmp_path}/meeting'\n"
            f"distributed.init_process_group('gloo', init_method=meeting, rank={rank}, world_size=2)\n"
            f"print(package_model_dir({NAME!r}))\n"
            "distributed.barrier()\n"
        )
        done = run_python(["-c", script])
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    with ThreadPoolExecutor(2) as pool:
        first, second = (Path(found) for found in pool.map(convert, (0, 1)))
    assert first != second
    files = sorted(path.name for path in first.iterdir())
    assert "model.safetensors" in files and files == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_a_conversion_that_wrote_no_weights_is_told_and_not_kept(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_: None)
    with pytest.raises(ModelLoadError, match="were not written"):
        package_model_dir(NAME)
    assert leftovers(cache_dir) == [] and not list(cache_dir.rglob("tokenizer.json"))


def test_a_damaged_conversion_is_made_again() -> None:
    weights_path = package_model_dir(NAME) / "model.safetensors"
    whole = weights_path.read_bytes()
    weights_path.write_bytes(whole[:5000])
    assert (package_model_dir(NAME) / "model.safetensors").read_bytes() == whole


def test_a_conversion_killed_half_way_is_cleared_away_and_redone(cache_dir: Path) -> None:
    script = (
        "import os, shutil\nfrom pathlib import Path\nfrom tasks.core.models import packaged\n"
        "def killed(path): os.kill(os.getpid(), 9)\n"
        "packaged.flush_to_disk = killed\n"  # all files are written, nothing is renamed
        f"packaged.package_model_dir({NAME!r})\n"
    )
    done = run_python(["-c", script])
    assert done.returncode == -9
    assert len(leftovers(cache_dir)) == 1
    assert (package_model_dir(NAME) / "model.safetensors").is_file()
    assert leftovers(cache_dir) == []


def test_a_full_disk_is_a_storage_error_and_leaves_nothing_half_done(cache_dir: Path) -> None:
    script = (
        "import resource, signal\nfrom tasks.core.models.packaged import package_model_dir\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"package_model_dir({NAME!r})\n"
    )
    done = run_python(["-c", script])
    assert "StorageError" in done.stderr
    assert "TUNEPROOF_CACHE" in done.stderr
    assert leftovers(cache_dir) == []
    assert (package_model_dir(NAME) / "model.safetensors").is_file()


def test_a_changed_file_in_the_package_is_converted_anew(
    package_root: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import build_tiny_model

    before = package_model_dir(NAME)
    (tmp_path / "other" / "tiny_package").mkdir(parents=True)
    (tmp_path / "other" / "tiny_package" / "__init__.py").touch()
    model = build_tiny_model(tiny_tokenizer, seed=7)
    write_tiny_gguf(model, tiny_tokenizer, tmp_path / "other" / "tiny_package" / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path / "other")
    assert package_model_dir(NAME) != before


@pytest.mark.parametrize(
    "name",
    [
        *("package:", "package:tiny_package", "package:tiny_package/../secret.gguf", "package:/etc/x.gguf"),
        *("package:tiny_package/model.bin", "package:tiny_package/a/b.gguf", "package:os.path/x.gguf"),
    ],
)
def test_a_malformed_package_name_shows_the_right_form(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"package:<module>/<file>\.gguf"):
        find_packaged_file(name)


def test_an_absent_package_and_an_absent_file_say_what_to_do() -> None:
    with pytest.raises(ModelNotFoundError, match="not_there is not installed") as caught:
        find_packaged_file("package:not_there/x.gguf")
    assert "pip install" not in str(caught.value.next_step)  # a misspelt name may be anybody's package
    with pytest.raises(ModelNotFoundError, match=r"no file x\.gguf \(GGUF files in it: tiny\.gguf\)"):
        find_packaged_file("package:tiny_package/x.gguf")
