"""A training by TRL's SFTTrainer, one rank of those that torchrun starts; the first prints its seconds as JSON.

    torchrun --standalone --nproc-per-node 2 bench/training_parts/usual.py ROWS MODEL_DIR BATCH_SIZE MAX_TOKENS BF16

`BATCH_SIZE` rows an update over all ranks, one epoch, LoRA of rank 16 at all linear layers, loss on answers only.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train and say how long the updates took."""
    rows_path, model_dir, batch_size, max_tokens, bf16 = sys.argv[1:]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [json.loads(line) for line in Path(rows_path).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=int(batch_size) // ranks,
            num_train_epochs=1,
            learning_rate=3e-4,
            max_length=int(max_tokens),
            train_sampling_strategy="group_by_length",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=bf16 == "1",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
        trainer: Any = SFTTrainer(
            model=model_dir, args=settings, train_dataset=Dataset.from_list(rows), peft_config=lora
        )
        metrics = trainer.train().metrics
    if trainer.is_world_process_zero():
        print(json.dumps({"seconds": metrics["train_runtime"], "updates": trainer.state.global_step}))


if __name__ == "__main__":
    main()
