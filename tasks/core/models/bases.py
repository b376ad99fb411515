"""On which base model an adapter stands, at which revision."""

from __future__ import annotations

from pathlib import Path

from tasks.core.errors import ModelLoadError
from tasks.core.models.checking import read_json
from tasks.core.models.locating import is_there


def base_of(adapter_dir: Path) -> tuple[str, str | None]:
    """The base's name and revision (None: its newest) as the adapter's files tell.

    A local base that has moved together with the adapter is found beside it. Raises ModelLoadError when the
    adapter names no base. Whether the base exists is for `locate` to say.
    """
    settings = read_json(adapter_dir / "adapter_config.json")
    base_id = settings.get("base_model_name_or_path")
    if not isinstance(base_id, str) or not base_id:
        raise ModelLoadError(
            f"{adapter_dir / 'adapter_config.json'} names no base model",
            "write the base's path or Hub id into base_model_name_or_path",
        )
    # Our own manifest pins the commit that was trained on; peft leaves its revision empty.
    trained_on = read_json(adapter_dir / "tuneproof_manifest.json")
    pinned = trained_on.get("base_model_revision") if trained_on.get("base_model_id") == base_id else None
    revision = pinned or settings.get("revision")
    if not is_there(base_id):
        beside = adapter_dir.resolve().parent / Path(base_id).name
        if (beside / "config.json").is_file():
            return str(beside), None
    elif Path(base_id).expanduser().exists() or base_id.startswith("package:"):
        return base_id, None  # revisions mean something on the Hub only
    return base_id, revision


def missing_base(directory: Path) -> str | None:
    """The name of an adapter's base that is not there; None for a full model or when it is there."""
    if not (directory / "adapter_config.json").is_file():
        return None
    base_id, _ = base_of(directory)
    return None if is_there(base_id) else base_id
