"""Adapters of every kind answer as peft's own layers do, merged or beside their base, with each engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.core.errors import ModelLoadError
from tasks.core.generation.engines.choosing import engine_classes
from tasks.core.models.loading import LoadedModel, identify, load_model_and_tokenizer
from tasks.core.records import GenerationSettings
from tests.conftest import build_tiny_model, build_tiny_tokenizer
from tests.generation.engines.test_engines import alone, answers, prompts, queue_of
from tests.making.model_files import edit_json, spec_of

pytestmark = pytest.mark.usefixtures("own_cache")

NEW_TOKENS = 6
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
        adapted.create_or_update_model_card = lambda *_: None  # takes longer than all the rest
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
    texts = prompts(4, loaded.model.config.vocab_size)
    end = loaded.tokenizer.eos_token_id
    free = alone(expected_model, texts, NEW_TOKENS, eos_token_id=end)
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
    assert len({tuple(tokens) for tokens in expected}) > 2  # not the same answer to everything
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
    for name in ("inflight", "generate"):
        engine = engine_classes()[name](loaded, settings)
        assert engine.unsupported() is None
        got = answers(engine, queue_of(texts, new_tokens=NEW_TOKENS), rows=3)
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


STAY_BESIDE = {"PiSSA, not converted", "repeated layers"}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_peft_without_merging(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, settings = KINDS[kind]
    base_dir = bases(base)
    adapter_dir = save_adapter(base_dir, tmp_path / "adapter", lora(**settings))
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    assert is_merged(loaded) == (kind not in STAY_BESIDE)
    assert_answers(loaded, peft_model(base_dir, adapter_dir))


@pytest.mark.parametrize(
    "kind", ["plain", "DoRA", "token indices, tied", "both tied ends", "modules to save", "experts"]
)
def test_answers_are_the_same_beside_the_base(
    kind: str, bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, settings = KINDS[kind]
    base_dir = bases(base)
    adapter_dir = save_adapter(base_dir, tmp_path / "adapter", lora(**settings))
    monkeypatch.setattr("tasks.core.models.adapters._ROUNDING", {})
    monkeypatch.setattr("tasks.core.models.adapters._NOISES", 0.0)
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    assert not is_merged(loaded)
    assert_answers(loaded, peft_model(base_dir, adapter_dir))


def test_an_ia3_adapter_answers_as_peft_does(bases: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    adapter_dir = save_adapter(bases("llama"), tmp_path / "adapter", config)
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    assert_answers(loaded, peft_model(bases("llama"), adapter_dir))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_peft_has_made_plain_on_saving_answers_as_it_did(
    start: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bases("llama"))
    adapted = get_peft_model(base, lora(init_lora_weights=start))
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "first")
    adapted.peft_config["default"].init_lora_weights = start
    torch.manual_seed(1)
    for name, part in adapted.named_parameters():
        if "lora_" in name:
            part.data.add_(0.1 * torch.randn_like(part))
    adapted.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    loaded = load_model_and_tokenizer(spec_of(tmp_path / "adapter"))
    assert_answers(loaded, peft_model(bases("llama"), tmp_path / "adapter"))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", ["plain", "DoRA", "both tied ends", "modules to save"])
def test_on_quantised_weights_answers_are_those_of_peft(
    bits: str, kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from tasks.core.models.placement import quantization_config

    base, settings = KINDS[kind]
    adapter_dir = save_adapter(bases(base), tmp_path / "adapter", lora(**settings))
    loaded = load_model_and_tokenizer(spec_of(adapter_dir, dtype="float32", **{f"load_in_{bits}": True}))
    assert not is_merged(loaded)
    quantised = {
        "quantization_config": quantization_config(bits, torch.float32), "device_map": {"": "cpu"},  # type: ignore[arg-type]
        "dtype": torch.float32,
    }  # fmt: skip
    reference = peft_model(bases(base), adapter_dir, **quantised)
    ids = torch.tensor([prompts(1, 400)[0]])
    assert torch.allclose(loaded.model(ids).logits, reference(ids).logits, atol=1e-4)
    if bits == "4bit":  # in 8 bits the scale of activations depends on the batch
        assert_answers(loaded, reference)


ADDING: dict[str, tuple[str, dict[str, Any], int]] = {
    "ends saved": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, 1),
    "ends saved, padded": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, 64),
    "tied ends saved": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}, 64),
    "embedding of tied ends saved": ("tied", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}, 1),
    "whole embeddings beside": ("llama", {"target_modules": ["q_proj", "v_proj"]}, 1),
    "whole tied embeddings beside": ("tied", {"target_modules": ["q_proj", "v_proj"]}, 8),
    "LoRA on ends": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 1),
    "LoRA on tied ends": ("tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADDING)
def test_an_adapter_with_added_tokens_makes_room_for_them_and_answers_as_peft_does(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, settings, multiple = ADDING[kind]
    adapter_dir = save_adapter(
        bases(base), tmp_path / "adapter", lora(**settings), added=3, multiple=multiple
    )
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    rows = loaded.model.config.vocab_size
    tokenizer = loaded.tokenizer
    assert rows % multiple == 0 and rows >= len(tokenizer) > len(build_tiny_tokenizer())
    assert tokenizer.convert_tokens_to_ids(ADDED[0]) == len(build_tiny_tokenizer())
    reference = peft_model(bases(base), adapter_dir, rows)
    assert_answers(loaded, reference)
    ids = torch.tensor([tokenizer.encode("Anna <|sum|> 3 <|equals|> 4")])
    assert torch.allclose(loaded.model(ids).logits, reference(ids).logits, atol=1e-3)


def test_added_tokens_that_learnt_one_by_one_answer_as_peft_does(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    first = len(build_tiny_tokenizer())
    config = lora(trainable_token_indices=[first, first + 1, first + 2], target_modules=["v_proj"])
    adapter_dir = save_adapter(bases("tied"), tmp_path / "adapter", config, added=3)
    (adapter_dir / "adapter_model.safetensors").rename(tmp_path / "whole.safetensors")
    from safetensors.torch import load_file, save_file

    kept = {
        name: part
        for name, part in load_file(tmp_path / "whole.safetensors").items()
        if "base_layer" not in name
    }
    save_file(kept, adapter_dir / "adapter_model.safetensors")
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    assert loaded.model.config.vocab_size == first + 3
    assert_answers(loaded, peft_model(bases("tied"), adapter_dir, first + 3))


def test_an_adapter_trained_on_a_smaller_vocabulary_makes_the_base_as_small(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    larger = tmp_path / "padded-base"
    model = build_tiny_model(build_tiny_tokenizer(), vocab_size=576)
    model.save_pretrained(larger)
    build_tiny_tokenizer().save_pretrained(larger)
    model.resize_token_embeddings(len(build_tiny_tokenizer()))
    model.save_pretrained(tmp_path / "shrunk")
    adapter_dir = save_adapter(
        tmp_path / "shrunk", tmp_path / "adapter", lora(modules_to_save=["embed_tokens", "lm_head"])
    )
    edit_json(adapter_dir / "adapter_config.json", base_model_name_or_path=str(larger))
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    assert_answers(loaded, peft_model(tmp_path / "shrunk", adapter_dir))


def test_tokens_without_weights_are_told_and_change_no_answer(
    bases: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter_dir = save_adapter(bases("llama"), tmp_path / "adapter", lora())
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(ADDED, special_tokens=True)
    tokenizer.save_pretrained(adapter_dir)
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    assert "3 tokens that its weights do not know, for example '<|carry|>'" in caplog.text
    again = load_model_and_tokenizer(spec_of(adapter_dir))
    ids = torch.tensor([[len(tokenizer) - 1, 5, 6]])
    assert torch.equal(loaded.model(ids).logits, again.model(ids).logits)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_adapters_of_virtual_tokens_are_refused_by_name(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind](
        task_type="CAUSAL_LM", num_virtual_tokens=4
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(bases("llama")), config).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ModelLoadError, match=r"(?s)P(ROMPT|REFIX)_TUNING.*LoRA, DoRA or IA3"):
        load_model_and_tokenizer(spec_of(tmp_path / "adapter"))


def test_an_adapter_whose_weights_are_not_all_there_is_refused(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter_dir = save_adapter(bases("llama"), tmp_path / "adapter", lora(target_modules=["q_proj"]))
    edit_json(adapter_dir / "adapter_config.json", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ModelLoadError, match="lacks 4 of the weights"):
        load_model_and_tokenizer(spec_of(adapter_dir))


def test_a_base_of_another_size_is_named_as_the_cause(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter_dir = save_adapter(bases("llama"), tmp_path / "adapter", lora(target_modules=["q_proj"]))
    edit_json(adapter_dir / "adapter_config.json", base_model_name_or_path=str(bases("qwen2")))
    with pytest.raises(ModelLoadError, match="does not fit its base"):
        load_model_and_tokenizer(spec_of(adapter_dir))


def test_in_half_precision_an_adapter_is_merged_only_within_the_noise_of_the_base(
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    adapter_dir = save_adapter(bases("llama"), tmp_path / "adapter", lora())
    monkeypatch.setattr("tasks.core.models.adapters._noise", lambda model, ids: 1.0)
    assert is_merged(load_model_and_tokenizer(spec_of(adapter_dir, dtype="bfloat16")))
    monkeypatch.setattr("tasks.core.models.adapters._noise", lambda model, ids: 1e-6)
    assert not is_merged(load_model_and_tokenizer(spec_of(adapter_dir, dtype="bfloat16")))
    assert "is merged into its base: logits differ by" in caplog.text
    assert "stays beside its base, which answers more slowly: logits differ by" in caplog.text


def test_a_run_with_an_adapter_on_tied_ends_has_a_key_of_its_own(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its answers were others when the shared matrix took both changes."""
    for base, targets, untied in (
        ("tied", ["lm_head"], True),
        ("tied", ["q_proj"], False),
        ("llama", ["lm_head"], False),
    ):
        adapter_dir = save_adapter(
            bases(base), tmp_path / f"{base}-{targets[0]}", lora(target_modules=targets)
        )
        assert ("tied embeddings" in identify(spec_of(adapter_dir)).content()) == untied


def test_a_merged_model_with_tied_ends_saves_both(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter_dir = save_adapter(
        bases("tied"), tmp_path / "adapter", lora(target_modules=["lm_head", "embed_tokens"])
    )
    loaded = load_model_and_tokenizer(spec_of(adapter_dir))
    loaded.model.save_pretrained(tmp_path / "full")
    loaded.tokenizer.save_pretrained(tmp_path / "full")
    assert json.loads((tmp_path / "full" / "config.json").read_text())["tie_word_embeddings"] is False
    full = load_model_and_tokenizer(spec_of(tmp_path / "full"))
    assert_answers(full, peft_model(bases("tied"), adapter_dir))
    upper = save_adapter(tmp_path / "full", tmp_path / "upper", lora())  # an adapter on a merged model
    assert_answers(load_model_and_tokenizer(spec_of(upper)), peft_model(tmp_path / "full", upper))
