"""Where rows come from: a Hub dataset, files on this machine, or a folder of either.

Everything ends as a `datasets.Dataset` over memory-mapped Arrow, so a million rows cost little memory.
"""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.data.formats.catalogue import kind_of, suffixes
from tasks.core.data.formats.tables import gaps_and_whole_numbers, whole_numbers
from tasks.core.data.local_files import open_files
from tasks.core.errors import DataError, first_line
from tasks.core.files import exists, is_folder

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from tasks.core.config import FineTunerConfig, InferencerConfig

_log = logging.getLogger(__name__)

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
_UNKNOWN_TYPE = "does not have a datasets dtype equivalent"
# `name` or `owner/name`, of at most 96 characters each: what the Hub allows.
_HUB_ID = re.compile(r"(?:\w[\w.-]{0,95}/)?\w[\w.-]{0,95}")
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB_HELP = (
    "Check the name on huggingface.co/datasets, log in with `hf auth login` or set HF_TOKEN if it is private or gated, "
    "or give the path of a local file."
)


DataId = str | Sequence[str]
"""A path, a pattern or a Hub id; or several of them, whose rows follow one another."""


def training_rows(settings: FineTunerConfig, max_rows: int | None = None) -> Dataset:
    """Open the rows that are learnt, `max_rows` of them instead of the setting's. Raises DataError."""
    return load_rows(
        settings.required_training_data_id,
        split=settings.training_data_split,
        revision=settings.training_data_revision,
        num_proc=settings.dataset_num_proc,
        max_rows=settings.max_rows if max_rows is None else max_rows,
    )


def validation_rows(settings: FineTunerConfig, data_id: DataId) -> Dataset:
    """Open the rows that training is measured on. Raises DataError."""
    return load_rows(
        data_id,
        split=settings.validation_data_split,
        revision=settings.validation_data_revision,
        num_proc=settings.dataset_num_proc,
        max_rows=settings.max_rows,
    )


def test_rows(settings: InferencerConfig) -> Dataset:
    """Open the rows that are answered. Raises DataError."""
    return load_rows(
        settings.required_testing_data_id,
        split=settings.testing_data_split,
        revision=settings.testing_data_revision,
        max_rows=settings.max_rows,
    )


def load_rows(
    data_id: DataId,
    *,
    split: str | None,
    revision: str | None = None,
    num_proc: int | None = None,
    max_rows: int | None = None,
) -> Dataset:
    """Open the rows of `data_id` in their order; the first `max_rows` of them if that is given.

    `data_id` is a path (.jsonl, .json, .csv, .tsv, .parquet, .arrow, a folder of such files, a `save_to_disk`
    folder), a pattern (`data/*.jsonl`; files in the order of their names) or a Hub id, with `:configuration` behind
    it where the dataset has several. `split` may carry a slice, such as `train[:10%]`. A single file has one split,
    so the split's name is not looked at. `revision` and `num_proc` are for the Hub. Raises DataError.
    """
    name, span = _parse_split(split)
    ids = (data_id,) if isinstance(data_id, str) else tuple(data_id)
    if not ids:
        raise DataError("The list of data is empty.", "Name at least one file, folder or Hub id.")
    check_source(ids)
    with _quiet_progress(), _memory_told(data_id):
        rows = _open(ids, name, revision, num_proc)
    if revision is not None and all(_is_here(one) for one in ids):
        _log.warning("The revision %r is not used: %s is on this machine.", revision, described_data(data_id))
    rows = _first_rows(_sliced(rows, span), max_rows)
    if len(rows) == 0:
        raise DataError(
            f"{described_data(data_id)} (split {split!r}) holds no rows.",
            "Check the file, the split and max_rows.",
        )
    return rows


def described_data(data_id: DataId) -> str:
    """The data in words, for messages and manifests."""
    return data_id if isinstance(data_id, str) else ", ".join(data_id)


def _open(ids: Sequence[str], split: str | None, revision: str | None, num_proc: int | None) -> Dataset:
    files: list[Path] = []
    others: list[Dataset] = []
    for one in ids:
        found = _local_files(one, split)
        if found is not None:
            files += found
        elif is_folder(Path(one).expanduser()):
            others.append(_load_saved(Path(one).expanduser(), split))
        else:
            others.append(_load_from_hub(one, split, revision, num_proc))
    if not others:
        return open_files(files, list_name=split)
    if files and len(ids) > 1:
        raise DataError(
            f"{described_data(ids)}: files and other datasets cannot be read as one.",
            "Name files only, or datasets of the Hub and save_to_disk folders only.",
        )
    whole = [_with_whole_numbers(dataset) for dataset in others]
    return whole[0] if len(whole) == 1 else _joined(whole, ids)


def _joined(datasets: Sequence[Dataset], ids: Sequence[str]) -> Dataset:
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets(list(datasets))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{described_data(ids)} cannot be read as one: {error}", "Give them the same columns and types."
        ) from error


def _with_whole_numbers(rows: Dataset) -> Dataset:
    """Whole numbers that became floats where a table marked a gap are whole numbers again."""
    from datasets import Dataset, Value, concatenate_datasets
    from datasets.table import InMemoryTable

    names = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, Value)
        and feature.dtype.startswith("float")
        and gaps_and_whole_numbers(rows.data.column(name))
    ]
    if not names:
        return rows
    import pyarrow as pa

    whole = InMemoryTable(pa.table({name: whole_numbers(rows.data.column(name)) for name in names}))
    return concatenate_datasets([rows.remove_columns(names), Dataset(whole)], axis=1)


def check_source(data_id: DataId) -> None:
    """Raise DataError when data is neither there nor the name of a Hub dataset; opens nothing."""
    for one in (data_id,) if isinstance(data_id, str) else data_id:
        path = Path(one).expanduser()
        if _is_pattern(one):
            _matching(path)
        elif exists(path):
            continue
        elif _looks_like_path(one):
            raise _missing_file(path)
        elif _HUB_ID.fullmatch(one.partition(":")[0]) is None:
            raise DataError(
                f"{one!r} is neither a file or folder here nor the name of a Hub dataset.", _HUB_HELP
            )


# --- splits


def _parse_split(split: str | None) -> tuple[str | None, str | None]:
    """`train[:10%]` -> ("train", "[:10%]")."""
    if split is None:
        return None, None
    match = re.fullmatch(r"([\w.-]+)(\[[^\]]*\])?", split.strip())
    if match is None:
        raise DataError(
            f"The split {split!r} cannot be understood.", "Write a name (test) or a slice (train[:10%])."
        )
    return match[1], match[2]


def _sliced(rows: Dataset, span: str | None) -> Dataset:
    if span is None:
        return rows
    from datasets import ReadInstruction

    try:
        (instruction,) = ReadInstruction.from_spec(f"rows{span}").to_absolute({"rows": len(rows)})
        start, end, _ = slice(instruction.from_, instruction.to).indices(len(rows))
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"The slice {span!r} cannot be understood: {error}",
            "Write for example [:100], [100:200] or [:10%].",
        ) from error
    return rows.select(range(start, max(start, end)))


def _first_rows(rows: Dataset, max_rows: int | None) -> Dataset:
    return rows if max_rows is None or max_rows >= len(rows) else rows.select(range(max_rows))


def _choose_split(available: Sequence[str], wanted: str | None, where: str) -> str:
    if wanted is not None and wanted in available:
        return wanted
    if wanted is None and len(available) == 1:
        return available[0]
    said = "no split was asked for" if wanted is None else f"the split {wanted!r} is not there"
    raise DataError(f"{where}: {said}; there are: {', '.join(available)}.", "Set the split to one of these.")


# --- this machine


def _looks_like_path(data_id: str) -> bool:
    """A Hub id is `name` or `owner/name`, perhaps with `:configuration`."""
    return (
        data_id.startswith((".", "/", "~"))
        or "\\" in data_id
        or data_id.count("/") > 1
        or kind_of(Path(data_id)) is not None
    )


def _missing_file(path: Path) -> DataError:
    folder = path.parent
    if not is_folder(folder):
        return DataError(
            f"There is no file {path}; the folder {folder} does not exist either.", "Check the path."
        )
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = (
        get_close_matches(path.name, names, n=3, cutoff=0.5)
        or [name for name in names if kind_of(Path(name))][:5]
    )
    hint = f"Did you mean: {', '.join(near)}?" if near else "Check the path."
    return DataError(f"There is no file {path.name} in {folder.resolve()}.", hint)


def _is_here(data_id: str) -> bool:
    return _is_pattern(data_id) or exists(Path(data_id).expanduser())


def _is_pattern(data_id: str) -> bool:
    return any(mark in data_id for mark in "*?[") and not exists(Path(data_id).expanduser())


def _local_files(data_id: str, split: str | None) -> list[Path] | None:
    """The files that a path or pattern names; None for a `save_to_disk` folder and for what is not here."""
    path = Path(data_id).expanduser()
    if _is_pattern(data_id):
        return _of_split(_matching(path), split, f"The pattern {data_id}", path.anchor or ".")
    if is_folder(path):
        return None if _is_saved(path) else _files_in(path, split)
    if exists(path):
        if kind_of(path) is None:
            raise DataError(
                f"{path} is no data file that can be read.", f"Use one of {', '.join(suffixes())}."
            )
        if not path.is_file():  # opening a pipe would wait for whoever writes to it
            raise DataError(f"{path} is a pipe or a device and no file.", "Write its rows into a file first.")
        return [path]
    if _looks_like_path(data_id):
        raise _missing_file(path)
    return None


def _matching(pattern: Path) -> list[Path]:
    """The data files that a pattern matches, also those in folders that it matches."""
    found = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207 - Path.glob gives hidden files
    inside = (inner for path in found if path.is_dir() for inner in sorted(path.rglob("*")))
    files = _data_files(dict.fromkeys((*found, *inside)))
    if files:
        return files
    if found:
        named = ", ".join(path.name for path in found[:5])
        raise DataError(
            f"The pattern {pattern} matches no data file, only {named}.",
            f"Use files of {', '.join(suffixes())}.",
        )
    fixed = next(parent for parent in pattern.parents if not any(mark in str(parent) for mark in "*?["))
    if not fixed.is_dir():
        raise DataError(
            f"The pattern {pattern} matches nothing: there is no folder {fixed}.", "Check the path."
        )
    near = [str(path.relative_to(fixed)) for path in _data_files(sorted(fixed.rglob("*")))]
    close = get_close_matches(pattern.name, near, n=5, cutoff=0.3) or near[:5]
    raise DataError(
        f"The pattern {pattern} matches nothing in {fixed.resolve()}.",
        f"There are: {', '.join(close)}." if close else "Check the path.",
    )


def _data_files(paths: Iterable[Path]) -> list[Path]:
    """Those of the paths that hold rows; Arrow files only where there are no others, since they may be copies."""
    files = [
        path
        for path in paths
        if kind_of(path) is not None and path.name not in _METADATA_FILES and path.is_file()
    ]
    others = [path for path in files if kind_of(path) != ".arrow"]
    return others or [path for path in files if not path.name.startswith("cache-")]


def _files_in(folder: Path, split: str | None) -> list[Path]:
    files = _data_files(
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"The folder {folder} holds no data files.", f"Put files of {', '.join(suffixes())} there."
        )
    return _of_split(files, split, f"The folder {folder}", folder, is_strict=True)


def _of_split(
    files: Sequence[Path], split: str | None, where: str, root: str | Path, *, is_strict: bool = False
) -> list[Path]:
    """The files whose names tell this split; all where no name tells one.

    A pattern that matches one split only was written to match it, unless `is_strict`.
    """
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(root) if is_strict else Path(path.name)), []).append(
            path
        )
    named = [name for name in by_split if name is not None]
    if not named or (not is_strict and len(named) == 1):
        return list(files)
    wanted = _SPLIT_WORDS.get(split, split) if split else None
    chosen = by_split[_choose_split(named, wanted, where)]
    if not is_strict:
        _log.info("%s matches several splits; these files are read: %s.", where, ", ".join(map(str, chosen)))
    return chosen


def _split_of(path: Path) -> str | None:
    """`data/test-00000-of-00001.parquet` -> "test"; None where no part of the path names a split."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _load_saved(folder: Path, split: str | None) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded: Dataset | DatasetDict = load_from_disk(str(folder))
    except Exception as error:  # a column type that the library does not know, or a damaged folder
        return _load_saved_tables(folder, split, error)
    if isinstance(loaded, DatasetDict):
        return loaded[_choose_split(list(loaded), split, f"The folder {folder}")]
    return loaded


def _load_saved_tables(folder: Path, split: str | None, error: Exception) -> Dataset:
    """Read the Arrow files of a `save_to_disk` folder that the library itself refuses."""
    try:
        if (folder / "dataset_dict.json").exists():
            splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
            folder = folder / _choose_split(splits, split, f"The folder {folder}")
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / item["filename"] for item in state["_data_files"]]
        if state.get("_indices_data_files") or not files or not all(path.is_file() for path in files):
            raise ValueError("its tables are not all there")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"The save_to_disk folder {folder} cannot be read: {error}", "Save the dataset again."
        ) from error
    return open_files(files)


# --- the Hub


def _load_from_hub(data_id: str, split: str | None, revision: str | None, num_proc: int | None) -> Dataset:
    import datasets

    name, _, configuration = data_id.partition(":")
    try:
        loaded = datasets.load_dataset(
            name, configuration or None, split=split, revision=revision, num_proc=num_proc
        )
    except Exception as error:  # the Hub client has no common base class for its errors
        if _UNKNOWN_TYPE not in f"{error} {error.__cause__}":
            raise _hub_error(data_id, split, revision, error) from error
        return open_files(_hub_files(data_id, split, revision))
    if isinstance(loaded, datasets.DatasetDict):
        return loaded[_choose_split(list(loaded), split, f"The dataset {data_id}")]
    return loaded


def _hub_files(data_id: str, split: str | None, revision: str | None) -> list[Path]:
    """The files of a dataset that the library itself refuses for the type of one of its columns."""
    import datasets
    from huggingface_hub import HfFileSystem, hf_hub_download

    name, _, configuration = data_id.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, configuration or None, revision=revision)
        by_split = {str(known): list(urls) for known, urls in (builder.config.data_files or {}).items()}
        urls = by_split[_choose_split(list(by_split), split, f"The dataset {data_id}")]
        places: list[Any] = [HfFileSystem().resolve_path(url) for url in urls]
        return [
            Path(
                hf_hub_download(
                    place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision
                )
            )
            for place in places
        ]
    except DataError:
        raise
    except Exception as error:
        raise _hub_error(data_id, split, revision, error) from error


def _hub_error(data_id: str, split: str | None, revision: str | None, error: Exception) -> DataError:
    """Say in our words what the Hub client reports, with what to do about it."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    text = str(error).strip() or type(error).__name__
    at = f" at revision {revision!r}" if revision else ""
    if splits := re.search(r"Unknown split .*?Should be one of \[(.*?)\]", text, re.DOTALL):
        there = splits[1].replace("'", "")
        return DataError(
            f"{data_id} has no split {split!r}; there are: {there}.", "Set the split to one of these."
        )
    if "Config name is missing" in text or "BuilderConfig" in text:
        return DataError(
            f"{data_id} has several configurations: {text}",
            f"Write the one you want behind a colon, such as {data_id.partition(':')[0]}:main.",
        )
    if constants.HF_HUB_OFFLINE:
        return DataError(
            f"{data_id}{at} is neither a file here nor in the local Hub cache, and the Hub is switched off "
            "(HF_HUB_OFFLINE).",
            "Unset HF_HUB_OFFLINE to download it, or give the path of a local file.",
        )
    if isinstance(error, DatasetNotFoundError):
        return DataError(
            f"The dataset {data_id}{at} is not on the Hub, or not open to you: {text}", _HUB_HELP
        )
    if isinstance(error, (ConnectionError, TimeoutError)) or "onnection" in type(error).__name__:
        return DataError(
            f"The Hub cannot be reached for {data_id}{at}: {first_line(error)}",
            "Check the network (and HF_ENDPOINT), or give the path of a local file.",
        )
    return DataError(
        f"{data_id}{at} could not be loaded from the Hub: {type(error).__name__}: {text}", _HUB_HELP
    )


@contextmanager
def _memory_told(data_id: DataId) -> Iterator[None]:
    """Say which data it was that memory, or the depth of Python's stack, did not suffice for."""
    try:
        yield
    except MemoryError:
        raise DataError(
            f"Memory ran out while {described_data(data_id)} was read.",
            "Free memory, or split rows and files into smaller ones (JSON Lines and Parquet are read in parts).",
        ) from None
    except RecursionError:
        raise DataError(
            f"{described_data(data_id)} holds values that are nested too deeply to be read.",
            "Make them flatter, or save them as text.",
        ) from None


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """No progress bars of the library between our own lines."""
    import datasets

    was_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_shown:
            datasets.enable_progress_bars()
