"""The checkpoints of one training at a URL: whole or ignored there too; the seal is sent last and removed first."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tasks.core.storage.store import Store
from tasks.core.training import checkpoints
from tasks.core.training.validation import best_validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RemoteCheckpoints:
    """The checkpoints of one training, here and at the URL."""

    models: Store
    model_dir: Path

    @property
    def here(self) -> Path:
        """Where they are on this machine."""
        return self.model_dir / checkpoints.CHECKPOINTS

    def address(self, checkpoint: str, file: str = "") -> str:
        """Name within the store of a checkpoint or one of its files."""
        return f"{self.model_dir.name}/{checkpoints.CHECKPOINTS}/{checkpoint}" + (f"/{file}" if file else "")

    def there(self) -> dict[str, dict[str, int]]:
        """Names of checkpoints at the URL, oldest first, with the sizes of their files."""
        above = f"{self.model_dir.name}/{checkpoints.CHECKPOINTS}"
        found: dict[str, dict[str, int]] = {}
        for path, size in self.models.there(above).items():
            checkpoint, _, file = path.removeprefix(f"{above}/").partition("/")
            if file and checkpoints.step_of(Path(checkpoint)) >= 0:
                found.setdefault(checkpoint, {})[file] = size
        return dict(sorted(found.items(), key=lambda item: checkpoints.step_of(Path(item[0]))))

    def bring_newest(self) -> None:
        """Bring the newest whole checkpoint there that is intact, and the best that goes with it."""
        whole = [name for name, files in self.there().items() if checkpoints.SEAL_NAME in files]
        for name in reversed(whole):
            if self._bring(name) and ((best := best_of(self.here / name)) is None or self._bring(best)):
                logger.info("%s is there to go on from", self.models.address_of(self.address(name)))
                return
            logger.warning("%s is damaged, or lacks its best one", self.models.address_of(self.address(name)))

    def _bring(self, name: str) -> bool:
        directory = self.here / name
        self.models.pull(self.address(name))
        if not checkpoints.is_intact(directory):  # a copy that was damaged here is brought once more
            checkpoints.remove(directory)
            self.models.pull(self.address(name))
        return checkpoints.is_intact(directory)

    def send(self, checkpoint_dir: Path) -> bool:
        """Send a whole checkpoint, its seal last; False when it was removed or written anew meanwhile."""
        seal_path, name = checkpoint_dir / checkpoints.SEAL_NAME, checkpoint_dir.name
        seal_address = self.address(name, checkpoints.SEAL_NAME)
        try:
            seal, sizes = seal_path.read_bytes(), checkpoints.file_bytes(checkpoint_dir)
        except (OSError, ValueError, KeyError):
            return False
        present = self.models.read(seal_address)
        if present == seal:
            return True
        if present is not None:
            self.models.remove(seal_address)
        for file in sorted(sizes):
            if not _is_still(seal_path, seal):
                return False
            self.models.push([checkpoint_dir / file])
        if not _is_still(seal_path, seal) or self.there().get(name) != sizes:
            return False
        self.models.push([seal_path])
        return True

    def rotate(self, newest: str, keep: int, best: str | None) -> None:
        """Remove all there but the newest `keep` whole ones, the one that was sent last and its best."""
        found = self.there()
        whole = [name for name, files in found.items() if checkpoints.SEAL_NAME in files]
        if newest not in whole:
            return
        kept = {*whole[-keep:], newest, *([best] if best else [])}
        self._remove({name: files for name, files in found.items() if name not in kept})

    def remove_all(self) -> None:
        """Forget an unfinished training there."""
        self._remove(self.there())

    def _remove(self, found: dict[str, dict[str, int]]) -> None:
        for name, files in found.items():
            if checkpoints.SEAL_NAME in files:
                self.models.remove(self.address(name, checkpoints.SEAL_NAME))
            self.models.remove_files(
                [self.address(name, file) for file in files if file != checkpoints.SEAL_NAME]
            )


def best_of(checkpoint_dir: Path) -> str | None:
    """The checkpoint with the weights that were best up to this one; None where it is that itself, or none is."""
    best = best_validation(checkpoints.read_log(checkpoint_dir))
    if best is None or best.step == checkpoints.step_of(checkpoint_dir):
        return None
    return checkpoints.at_step(checkpoint_dir.parent, best.step).name


def _is_still(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False
