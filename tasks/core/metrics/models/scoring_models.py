"""The models that score answers, made from the settings when a metric first asks for them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from tasks.core.config.sections import LOCAL_MODEL
from tasks.core.errors import EvaluationError
from tasks.core.files import cache_dir
from tasks.core.metrics.catalogue import prompt_sha256
from tasks.core.metrics.judge import endpoint, local
from tasks.core.metrics.judge.calibration import CalibrationBook, JudgeStanding, standing_of
from tasks.core.metrics.judge.endpoint import Endpoint, EndpointJudge, Prices
from tasks.core.metrics.judge.judge import Judge, JudgeBackend, Progress
from tasks.core.metrics.judge.local import LocalJudge
from tasks.core.metrics.judge.replies import ReplyStore
from tasks.core.metrics.models.embedding import (
    PACKAGED_NAME,
    Embedder,
    EndpointEmbedder,
    LocalEmbedder,
)
from tasks.core.metrics.models.token_matching import TokenMatcher
from tasks.core.metrics.usage import EmbeddingUsage, JudgeUsage

if TYPE_CHECKING:
    from tasks.core.config import EvaluatorConfig

_SECRET_BLOCK = "secret:"


class ScoringModels:
    """Judge, embedding model and token matcher of one evaluation; see `Sources`.

    `api_key` is given when it comes from elsewhere than the environment (a Prefect Secret block). A key is
    looked for only when a metric needs an endpoint.
    """

    def __init__(
        self,
        config: EvaluatorConfig,
        *,
        api_key: SecretStr | None = None,
        on_progress: Progress | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._given_key = api_key
        self._on_progress = on_progress
        self._environ = os.environ if environ is None else environ

    @cached_property
    def judge(self) -> Judge:
        """The judge model. Raises EvaluationError when it is not set, or its key is missing."""
        backend = self._backend()
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", backend.model).strip("-")[-60:]
        digest = hashlib.sha256(backend.identity.encode()).hexdigest()[:12]
        return Judge(backend, ReplyStore(self._cache_dir() / f"{name}-{digest}.jsonl"), self._on_progress)

    def _backend(self) -> JudgeBackend:
        config = self._config
        if config.llm is None:
            raise EvaluationError("a metric needs a judge model", "set llm in [evaluator]; see docs/judge.md")
        if config.llm.startswith(LOCAL_MODEL):
            limit = config.judge_max_tokens or local.DEFAULT_REPLY_TOKENS
            return LocalJudge(config.llm.removeprefix(LOCAL_MODEL), max_tokens=limit)
        return EndpointJudge(
            config.llm,
            self._endpoint(config.judge_base_url, f"the judge {config.llm}"),
            concurrency=config.judge_concurrency,
            max_tokens=config.judge_max_tokens or endpoint.DEFAULT_REPLY_TOKENS,
            prices=Prices(config.cost_per_million_input_tokens, config.cost_per_million_output_tokens),
            budget_dollars=config.judge_budget_dollars,
        )

    @cached_property
    def embedder(self) -> Embedder:
        """The embedding model. Raises EvaluationError when it cannot be used."""
        config = self._config
        if config.embedding is None or config.embedding.startswith(LOCAL_MODEL):
            return LocalEmbedder((config.embedding or "").removeprefix(LOCAL_MODEL) or None)
        base_url = config.embedding_base_url or config.judge_base_url
        endpoint = self._endpoint(base_url, f"the embedding model {config.embedding}")
        return EndpointEmbedder(
            config.embedding, endpoint, ReplyStore(self._cache_dir() / "embeddings.jsonl")
        )

    @cached_property
    def token_matcher(self) -> TokenMatcher:
        """The model of bert_score."""
        return TokenMatcher(self._config.bert_score_model, self._config.bert_score_layer)

    def check(self) -> None:
        """Raise a TuneproofError when a metric of the settings lacks its key, package or model; calls no model."""
        config = self._config
        if config.judged_metrics:
            self._backend().check()
        if config.embedded_metrics:
            self.embedder.check()
        if config.metrics_asking("bert_score"):
            self.token_matcher.check()

    def probe(self) -> None:
        """Find out at once whether the judge's endpoint is there; what is wrong is raised when it must be asked.

        Where no reply is kept from earlier it must be asked, so it is raised now. Raises EvaluationError.
        """
        if self._config.judged_metrics:
            self.judge.probe()

    def judge_identity(self, metric: str) -> str:
        """What a calibration of the judge by a metric holds for, the embedding model included where one takes part."""
        if metric in self._config.embedded_metrics:
            return f"{self.judge.identity} and {self._config.embedding or PACKAGED_NAME}"
        return self.judge.identity

    def standings(self) -> tuple[JudgeStanding, ...]:
        """Whether each judged metric of the settings may decide about a model."""
        config = self._config
        if not config.judged_metrics:
            return ()
        known = CalibrationBook.of(config).read() if config.judge_minimum_kappa else ()
        return tuple(
            standing_of(
                metric, self.judge_identity(metric), prompt_sha256(metric), known, config.judge_minimum_kappa
            )
            for metric in config.judged_metrics
        )

    def described(self) -> dict[str, str]:
        """What judges and compares, by the word for it; for plans and messages."""
        config, told = self._config, {}
        if config.judged_metrics and config.llm is not None:
            told["judge"] = config.llm
        if config.embedded_metrics:
            told["embedding model"] = config.embedding or PACKAGED_NAME
        return told

    @property
    def judge_usage(self) -> JudgeUsage | None:
        """What the judge did; None when it was not needed."""
        return self.__dict__["judge"].usage() if "judge" in self.__dict__ else None

    @property
    def embedding_usage(self) -> EmbeddingUsage | None:
        """What the embedding model did; None when it was not needed."""
        return self.__dict__["embedder"].usage() if "embedder" in self.__dict__ else None

    def close(self) -> None:
        for name in ("judge", "embedder"):
            if name in self.__dict__:
                self.__dict__[name].close()

    def _cache_dir(self) -> Path:
        configured = self._config.judge_cache_dir
        return Path(configured).expanduser() if configured else cache_dir() / "verdicts"

    def _endpoint(self, base_url: str | None, whose: str) -> Endpoint:
        return Endpoint(
            base_url,
            self._api_key(base_url, whose),
            timeout_seconds=self._config.judge_timeout_seconds,
            max_retries=self._config.judge_max_retries,
        )

    def _api_key(self, base_url: str | None, whose: str) -> SecretStr | None:
        """The key; None for an endpoint of one's own when its place was not set."""
        place = self._config.judge_api_key
        if self._given_key is not None:
            return self._given_key
        if place.startswith(_SECRET_BLOCK):
            raise EvaluationError(
                f"the key of {whose} is in the Prefect Secret block {place.removeprefix(_SECRET_BLOCK)!r}, "
                "which only the command line and flows read",
                "give Evaluator its judge_api_key, or name an environment variable in judge_api_key",
            )
        variable = place.strip("${}")
        value = self._environ.get(variable, "").strip()
        if value:
            return SecretStr(value)
        if base_url is not None and "judge_api_key" not in self._config.model_fields_set:
            return None
        raise EvaluationError(
            f"the key of {whose} is missing: the environment variable {variable} is not set",
            f"set {variable}, name another place in judge_api_key, or leave the metrics that need it out "
            f"({', '.join(_names_that_need_models(self._config))})",
        )


def _names_that_need_models(config: EvaluatorConfig) -> tuple[str, ...]:
    wanted = {*config.judged_metrics, *config.embedded_metrics}
    return tuple(name for name in config.metrics if name in wanted)
