"""Hostile models: configuration, weights, tokenizer, adapter."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.items import MARKER, Item, Outcome, changed_json, changed_model


def _config(
    name: str, outcome: Outcome = "refused", says: str = "", *, slow: bool = False, **changes: Any
) -> Item:
    def change(model_dir: Path) -> None:
        changed_json(model_dir / "config.json", **changes)

    return changed_model(f"config.json: {name}", change, outcome, says, slow=slow)


def _file(
    name: str, file_name: str, content: bytes | None, outcome: Outcome = "refused", says: str = ""
) -> Item:
    def change(model_dir: Path) -> None:
        path = model_dir / file_name
        path.unlink(missing_ok=True) if content is None else path.write_bytes(content)

    return changed_model(f"{file_name}: {name}", change, outcome, says)


def _weights(
    name: str, change: Callable[[bytes], bytes], outcome: Outcome = "refused", says: str = ""
) -> Item:
    def rewrite(model_dir: Path) -> None:
        path = model_dir / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return changed_model(f"model.safetensors: {name}", rewrite, outcome, says)


def _with_header(content: bytes, header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + content


def _pickled(name: str, model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    marker = model_dir.parent / MARKER
    (model_dir / name).write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())


def _remote_code(model_dir: Path) -> None:
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    changed_json(model_dir / "config.json", auto_map=names, model_type="own-kind")
    (model_dir / "code.py").write_text(f"open({str(model_dir.parent / MARKER)!r}, 'w').close()\n")


def _tokenizer_code(model_dir: Path) -> None:
    names = {"AutoTokenizer": ["code.Own", None]}
    changed_json(model_dir / "tokenizer_config.json", auto_map=names, tokenizer_class="Own")
    (model_dir / "code.py").write_text(f"open({str(model_dir.parent / MARKER)!r}, 'w').close()\n")


def _adapter(model_dir: Path, **settings: Any) -> None:
    base = model_dir.parent / "base"
    model_dir.rename(base)
    model_dir.mkdir()
    written = {
        "base_model_name_or_path": str(base),
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj"],
    }
    (model_dir / "adapter_config.json").write_text(json.dumps(written | settings))


def _pickled_adapter(model_dir: Path) -> None:
    _adapter(model_dir)
    marker = model_dir.parent / MARKER
    (model_dir / "adapter_model.bin").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())


def _index_out(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir.parent / "out.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "../out.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))


def _gguf(name: str, content: bytes) -> Item:
    def change(model_dir: Path) -> None:
        (model_dir / "model.safetensors").unlink()
        (model_dir / "config.json").unlink()
        (model_dir / "model.gguf").write_bytes(content)

    return changed_model(f"GGUF: {name}", change, "refused")


ITEMS: tuple[Item, ...] = (
    _config("more layers than any machine holds", num_hidden_layers=10**9, slow=True),
    _config("wider than any machine holds", hidden_size=10**12, slow=True),
    _config("vocabulary without end", vocab_size=10**13, slow=True),
    _config("another width than the weights", hidden_size=32),
    _config("negative width", hidden_size=-64),
    _config("width is a text", hidden_size="wide"),
    _config("no heads", num_attention_heads=0),
    _config("unknown kind of model", model_type="emperor"),
    _config("no kind of model", model_type=None),
    _config("positions are a text", max_position_embeddings="many"),
    _file("is gone", "config.json", None),
    _file("is empty", "config.json", b""),
    _file("is a list", "config.json", b"[1]"),
    _file("is torn", "config.json", b'{"model_type": "lla'),
    _file("never ends", "config.json", b'{"a":' * 100_000),
    _file("is gone", "model.safetensors", None),
    _file("is empty", "model.safetensors", b""),
    _weights("torn", lambda content: content[: len(content) // 2]),
    _weights("header longer than the file", lambda content: struct.pack("<Q", 2**40) + content[8:]),
    _weights("header longer than any memory", lambda content: struct.pack("<Q", 2**63) + content[8:]),
    _weights("header is no JSON", lambda content: _with_header(content, b"x" * 100)),
    _weights("header never ends", lambda content: _with_header(content, b'{"a":' * 20_000)),
    _weights("no tensors", lambda content: _with_header(b"", b"{}")),
    changed_model("weights: pickled", partial(_pickled, "pytorch_model.bin"), "refused", "safetensors|pickle"),
    changed_model("weights: an index that leads out", _index_out, "refused"),
    changed_model("adapter: pickled", _pickled_adapter, "refused", "safetensors|pickle"),
    changed_model("adapter: without weights", _adapter, "refused"),
    changed_model("adapter: base is gone", partial(_adapter, base_model_name_or_path="/none/such"), "refused"),
    changed_model("adapter: base is the adapter", partial(_adapter, base_model_name_or_path="."), "refused"),
    changed_model("code: of the model", _remote_code, "refused"),
    changed_model("code: of the tokenizer", _tokenizer_code, "refused"),
    _file("is gone", "tokenizer.json", None),
    _file("is torn", "tokenizer.json", b'{"version": "1.0", "mod'),
    _file("is another JSON", "tokenizer.json", b'{"a": 1}'),
    _file("is torn", "tokenizer_config.json", b'{"eos_token": '),
    _file("is torn", "generation_config.json", b'{"eos_'),
    _file("temperature is a text", "generation_config.json", b'{"temperature": "hot"}', "answered"),
    _file("end token out of range", "generation_config.json", b'{"eos_token_id": 999999999}', "answered"),
    _gguf("torn", b"GGUF" + struct.pack("<I", 3)),
    _gguf("tensors without end", b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62)),
    _gguf("no GGUF at all", b"\0" * 4096),
)  # fmt: skip
