"""A run directory: whose it is, which settings it belongs to, and whether it is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tasks.core.errors import EvaluationError, RunKeyMismatchError, RunLockedError, first_line
from tasks.core.files import Inside, flush_to_disk, storage_error, write_once
from tasks.core.leftovers import remove_leftovers
from tasks.core.links import refuse_links_out
from tasks.core.locking import HeldElsewhereError, owned_lock
from tasks.core.own_digest import without_own_digest
from tasks.core.records import RunIdentity, RunManifest
from tasks.core.runs.ledger import ROWS_KEPT
from tasks.core.runs.shards import Shard


def seal_path_of(references_path: Path) -> Path:
    """Where count and digest of a file of reference scores are."""
    return references_path.with_suffix(".seal.json")


_SHARED_FOLDER_SECONDS = 60.0  # no file there takes longer to write
_SHARD_NAME = re.compile(r"\d{1,9}-of-\d{1,9}")


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run. The manifest is written last, so its presence means that the predictions are whole."""

    path: Path
    identity_path = Inside("identity.json")
    """The settings this directory belongs to."""
    ledger_path = Inside("ledger.jsonl")
    """One line per finished row, in the order of finishing."""
    shards_path = Inside("shards")
    """Directories of the shards, each with a ledger, sessions and a lock of its own."""
    fetched_path = Inside("fetched")
    """What other machines answered, brought here; one directory for each ledger."""
    sessions_path = Inside("sessions.jsonl")
    """One line per working session: seconds, engine, memory events."""
    prompts_path = Inside("prompts.bin")
    """Scratch file with tokenised prompts; gone after publishing."""
    predictions_path = Inside("inferencer_output.jsonl")
    """The published answers in dataset order."""
    references_path = Inside("reference_likelihoods.jsonl")
    """Negative log-likelihood that the model gives each reference."""
    manifest_path = Inside("manifest.json")
    """What was run with which settings; written last."""

    @property
    def references_seal_path(self) -> Path:
        """Count and digest of the file of references, written after it: only with it is that file whole."""
        return seal_path_of(self.references_path)

    def shard(self, shard: Shard) -> RunDir:
        """The directory in which one shard of this run works."""
        return RunDir(self.shards_path / shard.name)

    def parts(self) -> list[RunDir]:
        """Its own directory, those of all shards there are, whatever their count, and what was fetched."""
        found = [*self.shards_path.glob("*-of-*"), *self.fetched_path.glob("*.*")]
        return [self, *(RunDir(path) for path in sorted(found))]

    def shard_name_of(self, part: RunDir) -> str | None:
        """Name of the shard that a part is of, here or fetched; None for the run's own and for unknown folders."""
        name = part.path.name.partition(".")[0]
        return name if part != self and _SHARD_NAME.fullmatch(name) else None

    def holds_answers(self) -> bool:
        """Whether there is a ledger with a row, or a published file."""
        ledgers = any(path.stat().st_size > 0 for path in self.ledger_paths())
        return ledgers or self.predictions_path.exists()

    def shard_references_path(self, shard: Shard) -> Path:
        """Where the references of a shard are scored: here, or where another machine's were brought."""
        own = self.shard(shard).references_path
        fetched = sorted(self.fetched_path.glob(f"{shard.name}.*/{own.name}"))
        return fetched[0] if fetched and not own.exists() else own

    def ledger_paths(self) -> tuple[Path, ...]:
        """All ledgers of this run: its own, and those of shards of this and of earlier attempts."""
        return tuple(part.ledger_path for part in self.parts() if part.ledger_path.exists())

    def read_manifest(self) -> RunManifest:
        """Return the manifest. Raises EvaluationError when the run is not finished or the file is damaged."""
        try:
            content = json.loads(self.manifest_path.read_bytes())
            return RunManifest.model_validate(without_own_digest(content))
        except FileNotFoundError as exc:
            raise EvaluationError(
                f"{self.path} has no manifest.json: its predictions are not finished",
                "run `tuneproof infer` with the same settings; it resumes where it stopped",
            ) from exc
        except (ValueError, AttributeError, RecursionError) as exc:  # no JSON, no object, no manifest
            raise EvaluationError(
                f"{self.manifest_path} is damaged ({first_line(exc)})",
                "delete it and run `tuneproof infer` again: the answers are kept in the ledger",
            ) from exc

    def finished_manifest(self) -> RunManifest | None:
        """Return the manifest when the published file is whole and untouched, else None."""
        try:
            manifest = self.read_manifest()
        except EvaluationError:
            return None
        try:
            with self.predictions_path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None
        return manifest if digest == manifest.predictions_sha256 else None

    def finished_manifest_of(self, run_key: str) -> RunManifest | None:
        """Return the manifest when this is a finished, untouched run of that key, else None."""
        try:
            manifest = self.read_manifest()
        except (EvaluationError, OSError):
            return None
        return self.finished_manifest() if manifest.run_key == run_key else None

    @property
    def run_key(self) -> str:
        """The key of the answers that the directory is bound to; "" where it is bound to none yet."""
        try:
            return RunIdentity.model_validate_json(self.identity_path.read_bytes()).run_key
        except (OSError, ValidationError):
            return ""

    def claim(self, identity: RunIdentity) -> None:
        """Bind the directory to `identity`; of several claims at once one wins.

        Raises RunKeyMismatchError when it belongs to other settings, or holds answers and nothing says by which
        settings they were made; StorageError when it cannot be written or leads out of its folder.
        """
        try:
            refuse_links_out(self.path)
            holds_answers = self.holds_answers()  # asked first: who answers has claimed it before
            if not self.identity_path.exists():
                mine = self._identity_by_manifest() if holds_answers else identity
                self.path.mkdir(parents=True, exist_ok=True)
                flush_to_disk(self.path.parent)
                write_once(self.identity_path, mine.model_dump_json(indent=2))
            owner = RunIdentity.model_validate_json(self.identity_path.read_bytes())
        except OSError as exc:
            raise storage_error(exc, self.identity_path, ROWS_KEPT) from exc
        except ValidationError as exc:
            raise RunKeyMismatchError(
                f"{self.identity_path} is damaged, so the answers in {self.path} cannot be told apart",
                "put a sound copy of it back, or delete it where there is a manifest.json, which tells the same; "
                "else use another run name, or delete the directory",
            ) from exc
        if owner.run_key != identity.run_key:
            differences = "\n    ".join(map(str, owner.differences(identity)))
            raise RunKeyMismatchError(
                f"{self.path} holds answers made with other settings (there -> now):\n    {differences}",
                "set inferencer.run_name or inferencer.run_name_suffix to keep both, go back to the old "
                "settings to resume, or delete the directory",
            )

    def _identity_by_manifest(self) -> RunIdentity:
        """Whose the answers are, where identity.json is gone. Raises RunKeyMismatchError when nothing says so."""
        try:
            return self.read_manifest().identity
        except EvaluationError as exc:
            raise RunKeyMismatchError(
                f"{self.path} holds answers, but {self.identity_path.name} is gone, which says by which model and "
                "settings they were made",
                f"put {self.identity_path.name} back to resume; use another run name, or delete the directory, to "
                "answer all rows anew",
            ) from exc

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for writing, and remove what killed writers left half-written.

        Raises RunLockedError naming the holder when another has it.
        """
        with ExitStack() as held:
            refuse_links_out(self.path)
            try:
                held.enter_context(owned_lock(self.path / ".lock"))
            except HeldElsewhereError as exc:
                raise RunLockedError(
                    f"{self.path} is being written by {exc.holder}",
                    "wait for it to end, or use another run name",
                ) from exc
            except OSError as exc:
                raise storage_error(exc, self.path) from exc
            remove_leftovers(self.path)
            remove_leftovers(self.path.parent, older_than_seconds=_SHARED_FOLDER_SECONDS)
            self.prompts_path.unlink(missing_ok=True)
            yield
