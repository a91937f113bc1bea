"""The mean of two tunings: between the two in every weight, and a folder that a predictor reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldvc import Predictor
from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import DECODERS
from ldvc.modeling.clip import LITE_FOLDER, save_clip_folder
from recipes.lite.average import average, between


def test_between_two_sets_of_weights() -> None:
    first = {"weight": torch.tensor([0.0, 4.0]), "count": torch.tensor(3)}
    second = {"weight": torch.tensor([8.0, 0.0]), "count": torch.tensor(5)}
    mean = between(first, second, 0.75)
    assert mean["weight"].tolist() == [6.0, 1.0] and mean["count"] == 5
    with pytest.raises(AssertionError):
        between(first, {"weight": second["weight"]}, 0.5)


def test_the_mean_of_two_folders_is_a_folder_with_a_tower_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "other").mkdir()
    for decoder in DECODERS:
        model, metadata = load_checkpoint("lite", decoder=decoder)
        with torch.no_grad():
            model.decoder.mask_scores.bias += 2
            model.clip.visual.proj += 0.5
        save_checkpoint(model, tmp_path / "other" / decoder, metadata={**metadata, "note": decoder}, clip="../clip")
    save_clip_folder(model.clip.model, tmp_path / "other" / "clip", {"base": str(LITE_FOLDER / "clip")})
    average(LITE_FOLDER, tmp_path / "other", 0.25, tmp_path / "mean")

    for decoder in DECODERS:
        before, _ = load_checkpoint("lite", decoder=decoder)
        after, metadata = load_checkpoint(tmp_path / "mean", decoder=decoder)
        assert metadata["note"] == decoder
        torch.testing.assert_close(after.decoder.mask_scores.bias, before.decoder.mask_scores.bias + 0.5)
        torch.testing.assert_close(after.clip.visual.proj, before.clip.visual.proj + 0.125, atol=1e-3, rtol=1e-3)
        changed = {
            name
            for name, tensor in after.trainable_state_dict().items()
            if not torch.allclose(tensor, before.trainable_state_dict()[name])
        }
        assert changed == {"decoder.mask_scores.bias"}
    predictor = Predictor.from_pretrained(str(tmp_path / "mean"), decoder="zegclip")
    torch.testing.assert_close(predictor.model.clip.visual.proj, after.clip.visual.proj)
