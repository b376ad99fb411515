"""Keys of the original fine-tune pipeline that mean nothing here: a warning each, never an error."""

from __future__ import annotations

from collections.abc import Mapping

_TEXT_MODELS_ONLY = "only the text part of a model is trained"

LEGACY_SECTIONS: Mapping[str, str] = {
    "mlflow": 'set MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, and [fine_tuner] report_to = "mlflow"',
}
LEGACY_KEYS: Mapping[tuple[str, str], str] = {
    ("fine_tuner", "use_flash_attention"): "PyTorch's own fused attention is used",
    ("fine_tuner", "wandb_project_name"): "set WANDB_PROJECT in the environment",
    ("fine_tuner", "is_multimodel"): _TEXT_MODELS_ONLY,
    ("fine_tuner", "finetune_vision_layers"): _TEXT_MODELS_ONLY,
    ("fine_tuner", "finetune_language_layers"): _TEXT_MODELS_ONLY,
    ("fine_tuner", "finetune_attention_modules"): "name the layers in target_modules",
    ("fine_tuner", "finetune_mlp_modules"): "name the layers in target_modules",
    ("evaluator", "hf_user_id"): "scores stay beside the answers; push_promoted puts them into the card",
    ("inferencer", "use_cache"): "keys and values of earlier tokens are always kept",
}
LEGACY_VALUES: Mapping[tuple[str, str, str], str] = {
    ("fine_tuner", "use_gradient_checkpointing", "unsloth"): "counts as true",
}
