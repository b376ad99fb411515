"""The judge: asks a model for verdicts, each only once ever, and keeps account of what that took."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.core.errors import EvaluationError
from tasks.core.metrics.judge.prompts import JudgePrompt, Verdict, read_verdict
from tasks.core.metrics.judge.replies import Reply, ReplyStore
from tasks.core.metrics.usage import JudgeUsage

# A reply that cannot be read is answered once with what is wrong with it.
_ROUNDS = 2

Progress = Callable[[int, int, str], None]
"""Takes how many verdicts are there, of how many, and a word on it."""


@dataclass(frozen=True, slots=True)
class NoVerdict:
    """Why the judge has no verdict."""

    reason: str


class JudgeBackend(Protocol):
    """A model that replies to prompts: at an endpoint, or on this machine."""

    model: str
    cut_reason: str
    """The failure of replies that reach the limit of tokens."""
    budget_dollars: float | None

    @property
    def endpoint(self) -> str | None:
        """Address, or None for a model on this machine."""

    @property
    def identity(self) -> str:
        """Everything besides the prompt that may change a reply."""

    def check(self) -> None:
        """Raise a TuneproofError when a package or the model is missing; loads and calls nothing."""

    def probe(self) -> None:
        """Raise EvaluationError when the model cannot be reached; costs nothing, or one token."""

    def reply(self, prompts: Sequence[JudgePrompt], keep: Callable[[int, Reply], None]) -> None:
        """Hand `keep` the position and reply of each prompt as soon as it is there, perhaps from other threads.

        Raises EvaluationError when no prompt can be answered, for example because the key is wrong.
        """

    def cost_dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        """What tokens cost; None when prices are not set."""


class Judge:
    """Verdicts for prompts. A prompt whose reply is in `store` is not asked; equal prompts are asked once."""

    def __init__(self, backend: JudgeBackend, store: ReplyStore, on_progress: Progress | None = None) -> None:
        self._backend = backend
        self._store = store
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter()
        self._cached: set[str] = set()
        self._asked: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._unreachable: EvaluationError | None = None

    @property
    def identity(self) -> str:
        """What judges: model and address, or digests of a local model."""
        return self._backend.identity

    def probe(self) -> None:
        """Raise EvaluationError when the judge cannot be reached, unless kept replies may be all that is needed.

        Then it is raised when the first prompt must be asked.
        """
        try:
            self._backend.probe()
        except EvaluationError as error:
            if not len(self._store):
                raise
            self._unreachable = error

    def ask(self, prompts: Sequence[JudgePrompt]) -> list[Verdict | NoVerdict]:
        """One verdict, or the reason why there is none, for each prompt."""
        digests = [prompt.digest(self._backend.identity) for prompt in prompts]
        waiting = dict(zip(digests, prompts, strict=True))
        found: dict[str, Verdict | NoVerdict] = {}
        current = {digest: (digest, prompt) for digest, prompt in waiting.items()}
        for number in range(1, _ROUNDS + 1):
            replies = self._replies(dict(current.values()))
            following: dict[str, tuple[str, JudgePrompt]] = {}
            for digest, (key, prompt) in current.items():
                reply = replies[key]
                if reply.failure is not None:
                    found[digest] = NoVerdict(f"judge: {reply.failure}")
                    continue
                outcome = read_verdict(reply.text, prompt.verdict, prompt.judged)
                if not isinstance(outcome, str):
                    found[digest] = outcome
                elif number < _ROUNDS:
                    again = prompt.again(reply.text, outcome)
                    following[digest] = (again.digest(self._backend.identity), again)
                else:
                    found[digest] = NoVerdict(f"judge: its reply cannot be used: {outcome}")
            current = following
        verdicts = [found[digest] for digest in digests]
        self._failures.update(verdict.reason for verdict in found.values() if isinstance(verdict, NoVerdict))
        return verdicts

    def _replies(self, prompts: dict[str, JudgePrompt]) -> dict[str, Reply]:
        """Replies by digest, from the store or from the model."""
        found = ((key, self._store.get(key, self._backend.cut_reason)) for key in prompts)
        replies = {key: reply for key, reply in found if reply is not None}
        self._cached.update(replies.keys() - self._asked)
        missing = [key for key in prompts if key not in replies]

        def keep(position: int, reply: Reply) -> None:
            key = missing[position]
            self._store.add(key, reply)
            replies[key] = reply
            self._asked.add(key)
            self._count(reply)
            self._tell(len(replies), len(prompts))

        if missing and self._unreachable is not None:
            raise self._unreachable
        if missing:
            self._backend.reply([prompts[key] for key in missing], keep)
        return replies

    def _tell(self, done: int, total: int) -> None:
        if self._on_progress is not None:
            cost = self.usage().cost_dollars
            spent = "" if cost is None else f", {cost:.4f} dollars"
            self._on_progress(done, total, f"{done} of {total} verdicts of {self._backend.model}{spent}")

    def _count(self, reply: Reply) -> None:
        with self._lock:
            self._totals["retries"] += reply.retries
            if reply.failure is None or reply.lasting:
                self._totals["calls"] += 1
                self._totals["input_tokens"] += reply.input_tokens
                self._totals["output_tokens"] += reply.output_tokens
                self._totals["calls_without_token_counts"] += not reply.tokens_were_counted

    def usage(self) -> JudgeUsage:
        """What was asked so far, what it took, and what failed."""
        with self._lock:
            totals = dict(self._totals)
        cost = self._backend.cost_dollars(totals.get("input_tokens", 0), totals.get("output_tokens", 0))
        return JudgeUsage(
            model=self._backend.model,
            endpoint=self._backend.endpoint,
            cached=len(self._cached),
            failures=dict(sorted(self._failures.items())),
            cost_dollars=cost,
            budget_dollars=self._backend.budget_dollars,
            **totals,
        )

    def close(self) -> None:
        self._store.close()
