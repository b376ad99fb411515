"""Pushes a finished model directory to the Hub, as a private repository unless asked otherwise."""

from __future__ import annotations

import logging
from pathlib import Path

from tasks.core.errors import TrainingError, first_line

logger = logging.getLogger(__name__)

_KEPT_HERE = ["checkpoints/**", "identity.json", ".*"]


def push(model_dir: Path, *, hf_user_id: str | None, private: bool = True) -> str:
    """Upload the model (without checkpoints) and return its Hub id; the token comes from the environment or login.

    A repository that does not exist is made as a `private` one; one that exists keeps who may see it. Raises
    TrainingError; the model itself is safe.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        owner = hf_user_id or api.whoami()["name"]
        repo_id = api.create_repo(f"{owner}/{model_dir.name}", private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo_id,
            folder_path=model_dir,
            ignore_patterns=_KEPT_HERE,
            commit_message=f"tuneproof: {model_dir.name}",
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise TrainingError(
            f"{model_dir} is complete, but it could not be pushed to the Hub: {first_line(error)}",
            "set HF_TOKEN to a token that may write, then run the same command with the same run_name: "
            "it only pushes",
        ) from error
    logger.info("pushed to https://huggingface.co/%s", repo_id)
    return repo_id
