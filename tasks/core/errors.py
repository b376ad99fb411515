"""Errors a person can act on: each says what happened, the value seen and what to do next."""

from __future__ import annotations

import re


class TuneproofError(Exception):
    """Base of all errors that tuneproof raises on purpose.

    `what` tells what happened with the value seen; `next_step` tells what to do about it.
    The command line prints both and ends with `exit_code`, without a traceback.
    """

    exit_code = 1

    def __init__(self, what: str, next_step: str | None = None) -> None:
        self.what = what
        self.next_step = next_step
        super().__init__(what if next_step is None else f"{what}\n  next: {next_step}")

    def __reduce__(self) -> tuple[type[TuneproofError], tuple[str, str | None]]:
        """Errors cross process borders; the two parts must survive pickling."""
        return type(self), (self.what, self.next_step)


class ConfigError(TuneproofError):
    """A setting is unknown, of the wrong type, out of bounds or in conflict with another."""

    exit_code = 2


class DataError(TuneproofError):
    """A dataset cannot be found or read, or lacks a column."""

    exit_code = 2


class ModelNotFoundError(TuneproofError):
    """No loadable model where one was looked for; the message lists what was searched."""

    exit_code = 2


class ModelLoadError(TuneproofError):
    """A model was found but cannot be used (unsafe weights, vocabulary mismatch, no kernel)."""

    exit_code = 2


class TemplateError(TuneproofError):
    """A chat template failed to render a conversation."""

    exit_code = 2


class NoAnswerError(TuneproofError):
    """The model gave no answer: its logits are no numbers, or every row of a run ended in an error."""

    exit_code = 2


class OutOfMemoryError(TuneproofError):
    """Memory ran out and no smaller step was left to try."""


class TrainingError(TuneproofError):
    """Training cannot start or cannot go on."""


class RunKeyMismatchError(TuneproofError):
    """A run directory holds answers made with other settings; mixing them is refused."""

    exit_code = 2


class RunLockedError(TuneproofError):
    """Another process is writing the same run directory."""

    exit_code = 2


class StorageError(TuneproofError):
    """A file could not be written (disk full, no permission); what was written stays intact."""


class LedgerCorruptError(TuneproofError):
    """A ledger has a damaged line that is not its last one."""


class EvaluationError(TuneproofError):
    """Predictions cannot be scored or compared."""

    exit_code = 2


class PromotionError(TuneproofError):
    """A model may not be promoted, or there is none to go back to."""

    exit_code = 2


_PLACE_IN_NATIVE_CODE = re.compile(r"^\s*\[[^\]\s]+\.(?:cc|cpp|cu|h|hpp):\d+\]\s*")


def first_line(error: BaseException, limit: int = 300) -> str:
    """What an error says in one line of at most `limit` characters: its type where it says nothing.

    Where in its own source a native library raised it is left out.
    """
    said = _PLACE_IN_NATIVE_CODE.sub("", str(error)).strip()
    return (said.splitlines() or [type(error).__name__])[0][:limit]
