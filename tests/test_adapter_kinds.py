"""Adapters of every kind answer as peft's own layers do, merged or beside their base, with each engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.generation.engine import engine_classes
from tasks.core.models.loading import LoadedModel, load_model_and_tokenizer
from tasks.core.records import GenerationSettings
from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.model_files import spec_of
from tests.test_engines import alone, answers, prompts, queue_of

pytestmark = pytest.mark.usefixtures("own_cache")

NEW_TOKENS = 8
ADDED = ["<|sum|>", "<|carry|>", "<|equals|>"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Base models by kind, each built once: a Llama with tied or untied ends, a Qwen2 (biases), GPT-2, a MoE."""
    root = tmp_path_factory.mktemp("bases")
    tokenizer = build_tiny_tokenizer()

    def base(kind: str) -> Path:
        directory = root / kind
        if not directory.exists():
            _model(kind, tokenizer).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        return directory

    return base


def _model(kind: str, tokenizer: Any) -> Any:
    import transformers as tf

    if kind in ("llama", "tied"):
        return build_tiny_model(tokenizer, tie_word_embeddings=kind == "tied")
    common = {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "initializer_range": 0.3,
    }  # fmt: skip
    grouped = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    configs: dict[str, Any] = {
        "qwen2": lambda: tf.Qwen2Config(**common, **grouped),
        "gpt2": lambda: tf.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=512),
        "moe": lambda: tf.Qwen3MoeConfig(
            **common, **grouped, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            decoder_sparse_step=1, norm_topk_prob=True,
        ),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return tf.AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32).eval()


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def save_adapter(base_dir: Path, directory: Path, config: Any, *, added: int = 0, multiple: int = 1) -> Path:
    """An adapter as peft saves it, with large random weights; `added` tokens enlarge the base before."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(base_dir)
        if added:
            tokenizer = build_tiny_tokenizer()
            tokenizer.add_tokens(ADDED[:added], special_tokens=True)
            base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
            tokenizer.save_pretrained(directory)
        adapted = get_peft_model(base, config)
        for name, part in adapted.named_parameters():
            if part.requires_grad:
                scale = 0.3 if "lora_" in name or "ia3" in name else 0.1
                part.data.add_(scale * torch.randn_like(part))
        adapted.save_pretrained(directory)
    return directory


def peft_model(base_dir: Path, adapter_dir: Path, rows: int | None = None, **loading: Any) -> Any:
    """The adapter as peft itself loads it, never merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_dir, **loading)
    if rows is not None:
        base.resize_token_embeddings(rows)
    return PeftModel.from_pretrained(base, adapter_dir).eval()


def assert_answers(loaded: LoadedModel, expected_model: Any) -> None:
    """Greedy answers of each engine to several prompts equal those of peft to each prompt alone."""
    texts = prompts(7, loaded.model.config.vocab_size)
    end = loaded.tokenizer.eos_token_id
    free = alone(expected_model, texts, NEW_TOKENS, eos_token_id=end)
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
    assert len({tuple(tokens) for tokens in expected}) > 3  # not the same answer to everything
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
    for name in ("inflight", "generate"):
        engine = engine_classes()[name](loaded, settings)
        assert engine.unsupported() is None
        got = answers(engine, queue_of(texts, new_tokens=NEW_TOKENS), rows=5)
        assert [list(got[place].token_ids) for place in range(len(texts))] == expected, name


def is_merged(loaded: LoadedModel) -> bool:
    return not hasattr(loaded.model, "peft_config")


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rank-stabilised": ("llama", {"use_rslora": True, "lora_alpha": 9}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA on all layers and ends": (
        "llama", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    ),
    "PiSSA, not converted": ("llama", {"init_lora_weights": "pissa"}),
    "PiSSA by iterations, not converted": ("llama", {"init_lora_weights": "pissa_niter_8"}),
    "OLoRA, not converted": ("llama", {"init_lora_weights": "olora"}),
    "modules to save": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}),
    "norms to save": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "all biases": ("qwen2", {"bias": "all"}),
    "biases of LoRA layers": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    "a bias in LoRA": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "token indices": ("llama", {"trainable_token_indices": [7, 40, 41], "target_modules": ["v_proj"]}),
    "token indices, tied": ("tied", {"trainable_token_indices": [7, 40, 41], "target_modules": ["v_proj"]}),
    "other token indices in each tied end": (
        "tied", {"trainable_token_indices": {"embed_tokens": [7, 40], "lm_head": [9]}, "target_modules": ["v_proj"]}
    ),
    "names": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "a pattern of names": ("llama", {"target_modules": r".*\.layers\.1\..*(q|gate)_proj"}),
    "ranks by pattern": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 32}}),
    "some layers": ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj"]}),
    "left out": ("llama", {"exclude_modules": ["gate_proj"]}),
    "repeated layers": ("llama", {"layer_replication": [[0, 2], [1, 2]], "target_modules": ["q_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "GPT-2's embedding": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "experts": ("moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "both tied ends": ("tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied ends by pattern": ("tied", {"target_modules": r".*(embed_tokens|lm_head|q_proj)"}),
    "tied ends kept equal": (
        "tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}
    ),
    "one tied end saved": ("tied", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}),
    "tied head saved": ("tied", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    "both tied ends saved": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied ends saved as one": (
        "tied", {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_peft_without_merging(
    kind: str, bases: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    base, settings = KINDS[kind]
    base_dir = bases(base)
    adapter_dir = save_adapter(base_dir, tmp_path / "adapter", lora(**settings))
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    print(kind, is_merged(loaded), [r.message for r in caplog.records if "adapter" in r.message])
    assert_answers(loaded, peft_model(base_dir, adapter_dir))
