"""A judge at an endpoint that speaks OpenAI's protocol, through the official client.

The client repeats calls that were not answered (connection lost, time out, 408, 409, 429, 5xx) with growing,
random pauses, and waits as long as `Retry-After` says. What stays here: several calls at once, what to leave
out when a server does not know it, the budget, and when to stop asking.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from tasks.core.errors import EvaluationError
from tasks.core.metrics.judge.prompts import JudgePrompt
from tasks.core.metrics.judge.replies import Reply, cut_reason

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

logger = logging.getLogger(__name__)

OUT_OF_BUDGET = "the budget is spent"
NO_ENDPOINT = "the endpoint stopped answering"
DEFAULT_REPLY_TOKENS = 2048
"""Longest reply where judge_max_tokens is not set."""
_REFUSED = "the endpoint refuses the call"
_BYTES_PER_TOKEN = 3.0
_FIRST_GUESS_OUTPUT_TOKENS = 300.0
_REFUSED_STATUS = frozenset({400, 413, 415, 422, 501})
_WRONG_KEY_STATUS = frozenset({401, 403})
_UNREADABLE_TRIES = 3
_NO_KEY = "none"
"""Sent where no key is set: the client insists on one, servers without accounts ignore it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where models are, and how patient to be with them."""

    base_url: str | None
    api_key: SecretStr | None
    timeout_seconds: float = 60.0
    max_retries: int = 5

    def client(self) -> OpenAI:
        """The official client. Raises EvaluationError when it is not installed."""
        try:
            from openai import OpenAI
        except ImportError as error:
            raise EvaluationError(
                "the package openai is not installed, which talks to the judge's endpoint",
                "pip install openai",
            ) from error
        return OpenAI(
            base_url=self.base_url,
            api_key=self.api_key.get_secret_value() if self.api_key else _NO_KEY,
            timeout=self.timeout_seconds,
            max_retries=self.max_retries,
        )

    def without_key(self, text: str, limit: int = 300) -> str:
        """One line of a server's message; some repeat the key that they were sent."""
        key = self.api_key.get_secret_value() if self.api_key else ""
        line = " ".join(text.split())
        return (line.replace(key, "(hidden)") if key else line)[:limit]


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars per million tokens."""

    input: float | None
    output: float | None

    def cost_dollars(self, input_tokens: float, output_tokens: float) -> float | None:
        """What tokens cost; None when a price is missing."""
        if self.input is None or self.output is None:
            return None
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


NO_PRICES = Prices(None, None)


@dataclass(frozen=True, slots=True)
class _Manner:
    """What is asked of the server; what it does not know is left out from then on."""

    form: str | None = "json_schema"
    temperature: bool = True
    token_limit: str | None = "max_completion_tokens"

    def without(self, complaint: str) -> _Manner | None:
        """The next plainer manner after a refusal; None when the refusal is about something else."""
        if "temperature" in complaint and self.temperature:
            return replace(self, temperature=False)
        if self.token_limit is not None and self.token_limit in complaint:
            return replace(self, token_limit="max_tokens" if self.token_limit != "max_tokens" else None)
        about_length = "context" in complaint and ("length" in complaint or "window" in complaint)
        if self.form is None or about_length:
            return None
        return replace(self, form="json_object" if self.form == "json_schema" else None)

    def arguments(self, prompt: JudgePrompt, max_tokens: int) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.form == "json_schema":
            schema = {"name": prompt.verdict.__name__, "strict": True, "schema": prompt.schema}
            arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.form == "json_object":
            arguments["response_format"] = {"type": "json_object"}
        if self.temperature:
            arguments["temperature"] = 0.0
        if self.token_limit is not None:
            arguments[self.token_limit] = max_tokens
        return arguments


class EndpointJudge:
    """Asks a model at an endpoint, several prompts at once. Safe to use from one thread at a time."""

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        *,
        concurrency: int = 8,
        max_tokens: int = DEFAULT_REPLY_TOKENS,
        prices: Prices = NO_PRICES,
        budget_dollars: float | None = None,
    ) -> None:
        self.model = model
        self.budget_dollars = budget_dollars
        self.cut_reason = cut_reason(max_tokens)
        self._endpoint = endpoint
        self._concurrency = concurrency
        self._max_tokens = max_tokens
        self._prices = prices
        self._lock = threading.Lock()
        self._manner = _Manner()
        self._spent_dollars = self._reserved_dollars = 0.0
        self._output_tokens = self._replies = 0
        self._unanswered = 0
        self._stopped: str | None = None
        self._complaints: set[str] = set()

    def check(self) -> None:
        """Raise EvaluationError when the client's package is missing; see JudgeBackend."""
        _ = self._client

    def probe(self) -> None:
        """Look whether the endpoint is there, takes the key and knows the model; see JudgeBackend.

        The list of models costs nothing. Where it does not name the model, which may be known by another name, one
        token is asked for. Any answer but 401, 403 and 404 is left to the calls that follow.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        client = self._client.with_options(max_retries=1, timeout=min(10.0, self._endpoint.timeout_seconds))
        try:
            if self.model in {found.id for found in client.models.list()}:
                return
            client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": "Reply: ok"}], max_tokens=1
            )
            return
        except APITimeoutError:
            logger.warning(
                "the judge's endpoint %s does not answer at once; it is asked all the same", self.endpoint
            )
            return
        except APIConnectionError as error:
            status, message = None, self._endpoint.without_key(str(error.__cause__ or error))
        except APIStatusError as error:
            was_about_list = error.request.url.path.endswith("/models")
            if error.status_code not in _WRONG_KEY_STATUS and (error.status_code != 404 or was_about_list):
                return
            status, message = error.status_code, self._endpoint.without_key(error.message)
        except (OpenAIError, ValueError, AttributeError, TypeError, LookupError):
            return
        # Beyond the except block, so that no exception of ours holds the request with its key.
        raise self._refusal(status, message)

    def _refusal(self, status: int | None, message: str) -> EvaluationError:
        if status is None:
            return EvaluationError(
                f"the judge's endpoint {self.endpoint} cannot be reached: {message}",
                "start it or correct judge_base_url; nothing was scored, verdicts so far are kept",
            )
        return EvaluationError(
            f"the judge {self.model} at {self.endpoint} refuses to work ({status}): {message}",
            "check llm, judge_base_url and the key that judge_api_key points to; verdicts so far are kept",
        )

    @cached_property
    def _client(self) -> OpenAI:
        return self._endpoint.client()

    @property
    def endpoint(self) -> str:
        return str(self._client.base_url).rstrip("/")

    @property
    def identity(self) -> str:
        """Model and address: another server may call another model by the same name."""
        return f"{self.endpoint} {self.model}"

    def cost_dollars(self, input_tokens: int, output_tokens: int) -> float | None:
        """What tokens cost; None when prices are not set."""
        return self._prices.cost_dollars(input_tokens, output_tokens)

    def reply(self, prompts: Sequence[JudgePrompt], keep: Callable[[int, Reply], None]) -> None:
        """Ask all prompts; see JudgeBackend. An interrupt lets the calls that are under way end first."""
        stopping = threading.Event()

        def work(position: int) -> None:
            if not stopping.is_set():
                keep(position, self._ask(prompts[position]))

        _ = self._client  # made here, so that a missing package is told once
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="judge") as pool:
            futures = [pool.submit(work, position) for position in range(len(prompts))]
            try:
                done, _rest = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
        for future in done:
            future.result()

    def _ask(self, prompt: JudgePrompt) -> Reply:
        """One prompt, unless the money is spent or the endpoint is gone."""
        guess_tokens = _size_bytes(prompt) / _BYTES_PER_TOKEN
        with self._lock:
            output_tokens = (
                self._output_tokens / self._replies if self._replies else _FIRST_GUESS_OUTPUT_TOKENS
            )
            cost = self._prices.cost_dollars(guess_tokens, output_tokens) or 0.0
            if self._unanswered >= max(10, 2 * self._concurrency):
                self._stopped = NO_ENDPOINT
            elif self._spent_dollars + self._reserved_dollars + cost > (self.budget_dollars or math.inf):
                self._stopped = OUT_OF_BUDGET
            if self._stopped is not None:
                return Reply(failure=self._stopped, lasting=False)
            self._reserved_dollars += cost
        reply = None
        try:
            reply = self._call(prompt)
        finally:
            self._account(reply, cost)
        return reply

    def _account(self, reply: Reply | None, reserved_dollars: float) -> None:
        with self._lock:
            self._reserved_dollars -= reserved_dollars
            if reply is None:
                return
            if reply.failure is None or reply.lasting:
                self._spent_dollars += (
                    self._prices.cost_dollars(reply.input_tokens, reply.output_tokens) or 0.0
                )
                self._output_tokens += reply.output_tokens
                self._replies += 1
                self._unanswered = 0
            elif not reply.failure.startswith(_REFUSED):
                self._unanswered += 1

    def _call(self, prompt: JudgePrompt) -> Reply:
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        unreadable = 0
        while True:
            manner = self._manner
            try:
                raw = self._client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=[{"role": m.role, "content": m.content} for m in prompt.messages],  # type: ignore[misc]
                    **manner.arguments(prompt, self._max_tokens),
                )
                return _read(raw.parse(), prompt, raw.retries_taken + unreadable, self.cut_reason)
            except APITimeoutError:
                return self._unanswered_reply("it did not reply in time")
            except APIConnectionError:
                return self._unanswered_reply("the connection failed")
            except APIStatusError as error:
                status, message = error.status_code, self._endpoint.without_key(error.message)
            except (OpenAIError, ValueError, AttributeError, TypeError, LookupError):
                # The body is not what the protocol says: no JSON, or other fields. The client tries once.
                unreadable += 1
                if unreadable == _UNREADABLE_TRIES:
                    return self._unanswered_reply("the endpoint's response is not of OpenAI's protocol")
                continue
            # Beyond the except block, so that no exception of ours holds the request with its key.
            refused = self._after_refusal(status, message, manner)
            if refused is not None:
                return refused

    def _unanswered_reply(self, failure: str) -> Reply:
        return Reply(failure=failure, lasting=False, retries=self._endpoint.max_retries)

    def _after_refusal(self, status: int, message: str, manner: _Manner) -> Reply | None:
        """None when the call is worth another try in a plainer manner. Raises EvaluationError for a wrong key."""
        if status in _WRONG_KEY_STATUS or (status == 404 and not self._replies):
            raise self._refusal(status, message)
        if status not in _REFUSED_STATUS:
            return self._unanswered_reply(f"the endpoint failed ({status})")
        plainer = manner.without(message.lower())
        with self._lock:
            if self._manner != manner:  # another call found out already
                return None
            # A server that took this form of reply before refuses something else.
            if plainer is not None and not (self._replies and plainer.form != manner.form):
                logger.info(
                    "the judge's endpoint refuses (%s); from now on it is asked more plainly", message
                )
                self._manner = plainer
                return None
            if message not in self._complaints:
                self._complaints.add(message)
                logger.warning("the judge's endpoint refuses a call (%d): %s", status, message)
        return Reply(failure=f"{_REFUSED} ({status})", lasting=False)


def _size_bytes(prompt: JudgePrompt) -> int:
    return sum(len(message.content.encode("utf-8", "replace")) for message in prompt.messages)


def _read(completion: ChatCompletion, prompt: JudgePrompt, retries: int, cut: str) -> Reply:
    """Text and tokens of a completion. Raises AttributeError, TypeError or LookupError when it is none."""
    choice = completion.choices[0]
    text = (choice.message.content or "").encode("utf-8", "replace").decode()
    failure = None
    if getattr(choice.message, "refusal", None) or choice.finish_reason == "content_filter":
        failure = "it declined to judge"
    elif choice.finish_reason == "length":
        failure = cut
    elif not text.strip():
        failure = "its reply is empty"
    usage = completion.usage
    if usage is not None and usage.prompt_tokens is not None and usage.completion_tokens is not None:
        return Reply(text, failure, True, usage.prompt_tokens, usage.completion_tokens, True, retries)
    input_tokens = int(_size_bytes(prompt) / _BYTES_PER_TOKEN) + 1
    output_tokens = int(len(text.encode()) / _BYTES_PER_TOKEN) + 1
    return Reply(text, failure, True, input_tokens, output_tokens, False, retries)
