"""Uploads a finished checkpoint to the Hugging Face Hub, without the files that only a resumed run needs."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

from ldvc.errors import LdvcError
from train.config import TrainConfig

NOT_UPLOADED = ["checkpoint-*/**", "*.new", ".new/**", "lock", ".training", "output.txt"]
_CARD = """---
library_name: ldvc
pipeline_tag: image-segmentation
tags: [open-vocabulary-segmentation, clip]
---

# {name}

Prompts, text adapter and the decoder `{config.model.decoder}` for the frozen CLIP `{config.model.clip}`, which is not stored
here. Trained for {config.max_train_steps} steps on {sets}; held-out classes: {unseen}. `train.json` is the whole configuration.

```python
from ldvc import Predictor

predictor = Predictor.from_pretrained("{name}")
```
"""


class HubError(LdvcError):
    """The Hub refuses or cannot be reached."""


def open_repository(config: TrainConfig) -> str:
    """Creates the repository, if it does not exist, and returns its full name.

    HubError if there is no token, no access or no network, or if the CLIP is a folder of this machine.
    """
    model = config.model
    if Path(model.clip).is_dir() or (model.pretrained and Path(model.pretrained).exists()):
        raise HubError(
            f"The CLIP {model.clip} is a folder of this machine, which a checkpoint on the Hub cannot load; train on 'lite' or "
            "an open_clip architecture, or leave push_to_hub out."
        )
    if not get_token():
        raise HubError("push_to_hub needs a token with write access in the environment variable HF_TOKEN.")
    try:
        return HfApi().create_repo(config.hub_model_id, exist_ok=True).repo_id
    except Exception as error:  # the client raises many kinds: HTTP errors, connection errors, wrong names
        raise HubError(f"The repository {config.hub_model_id} cannot be used: {first_line(error)}.") from None


def push(folder: Path, repository: str, config: TrainConfig) -> str:
    """Uploads the finished checkpoint and returns its address; HubError if that fails."""
    card = folder / "README.md"
    if not card.exists():
        text = _CARD.format(name=repository, config=config, sets=", ".join(config.sets), unseen=config.unseen or "none")
        card.write_text(text, encoding="utf-8")
    try:
        options = {"ignore_patterns": NOT_UPLOADED, "commit_message": f"Step {config.max_train_steps}"}
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder, **options))
    except Exception as error:
        raise HubError(
            f"The upload to {repository} failed: {first_line(error)}. The checkpoint in {folder} is complete; run the same "
            "command with --resume_from_checkpoint latest to try the upload again."
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
