"""Trainings at a URL: whose each is, what one needs to go on, and what is sent of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from tasks.core.errors import StorageError
from tasks.core.models.trained.folders import folder_of
from tasks.core.models.trained.model_store import send_model
from tasks.core.models.trained.registry import MANIFEST_NAME
from tasks.core.storage.lease import lease
from tasks.core.storage.store import Store
from tasks.core.training.identity import IDENTITY_NAME, TrainingIdentity, read_identity
from tasks.core.training.remote.checkpoints import RemoteCheckpoints
from tasks.core.training.remote.sender import LAST_SECONDS, CheckpointSender

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class RemoteTrainings:
    """The trainings at a URL. `keep` is how many whole checkpoints stay there, besides the best."""

    models: Store
    keep: int

    def bring_identities(self) -> None:
        """Bring whose each training is, so that one that was interrupted elsewhere is found. Raises StorageError."""
        self.models.pull_each(IDENTITY_NAME, MANIFEST_NAME)

    @contextmanager
    def held(self, model_dir: Path) -> Iterator[None]:
        """Hold the training against other machines. Raises RunLockedError naming the holder."""
        with lease(self.models, f"{model_dir.name}/lease.json"):
            yield

    def bring(self, model_dir: Path, *, resume: bool) -> None:
        """Bring the finished model, or what is needed to `resume` from the newest whole checkpoint there.

        What this machine has of another training of that name is moved aside. Raises StorageError.
        """
        self._move_aside(model_dir)
        folder_of(self.models, model_dir.name)
        if resume and (model_dir / IDENTITY_NAME).exists() and not (model_dir / MANIFEST_NAME).exists():
            RemoteCheckpoints(self.models, model_dir).bring_newest()

    def _move_aside(self, model_dir: Path) -> None:
        content, mine = self.models.read(f"{model_dir.name}/{IDENTITY_NAME}"), read_identity(model_dir)
        if content is None or mine is None or not model_dir.exists():
            return
        try:
            is_same = TrainingIdentity.model_validate_json(content) == mine
        except ValidationError:
            is_same = False
        if is_same:
            return
        number = 1
        while (aside := model_dir.with_name(f".{model_dir.name}.replaced-{number}")).exists():
            number += 1
        aside.mkdir()
        for path in model_dir.iterdir():
            if not path.name.startswith("."):  # the lock that is held stays
                path.rename(aside / path.name)
        logger.warning(
            "%s belongs to another training than the one this machine has of that name, which is kept as %s",
            *(self.models.address_of(model_dir.name), aside),
        )

    def claim(self, model_dir: Path, *, resume: bool) -> None:
        """Bind the folder there to the training that this machine begins or goes on with. Raises StorageError."""
        name, content = f"{model_dir.name}/{IDENTITY_NAME}", (model_dir / IDENTITY_NAME).read_bytes()
        if resume and self.models.read(name) == content:
            return
        RemoteCheckpoints(self.models, model_dir).remove_all()
        self.models.push([model_dir / IDENTITY_NAME])

    @contextmanager
    def sending(self, model_dir: Path) -> Iterator[None]:
        """Send whole checkpoints while the block runs; what cannot be sent is told and tried again, and stays here."""
        sender = CheckpointSender(RemoteCheckpoints(self.models, model_dir), self.keep)
        sender.start()
        try:
            yield
        except BaseException:
            sender.end(last_seconds=LAST_SECONDS)
            raise
        sender.end(last_seconds=None)

    def publish(self, model_dir: Path) -> None:
        """Send a complete model that is not there yet, its manifest last.

        A bucket that does not answer is waited for; raises StorageError after two minutes, and the model is kept.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(StorageError),
            wait=wait_exponential(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS),
            stop=stop_after_delay(_PATIENCE_SECONDS),
            before_sleep=lambda _: logger.warning(
                "%s could not be sent, it is tried again", self.models.address_of(model_dir.name)
            ),
            reraise=True,
        )
        retrying(send_model, self.models, model_dir)
