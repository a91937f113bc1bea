"""The recipe `published` against what ZegCLIP's code computes, by the numbers D1 to D11 of docs/method.md.

D5, bare scores, is in tests/test_decoders.py. D9, resizing in evaluation, is a difference that remains.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldvc import Predictor
from ldvc.config import RECIPES, ModelConfig
from ldvc.errors import CheckpointError
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from ldvc.modeling.towers import ImageTower, TextTower
from tests.tiny_data import make_set
from train.config import TrainConfig, load_config
from train.data import BACKGROUND, Augmentation, FolderDataset, Vocabulary, random_view
from train.losses import Processes, mask_loss
from train.objective import Objective, learning_rate, parameter_groups

PUBLISHED = RECIPES["published"]
IMAGENET = (torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375]))  # of pixels in 0..255
SENTENCES = """a photo of a {}. / a photo of a small {}. / a photo of a medium {}. / a photo of a large {}.
/ This is a photo of a {}. / This is a photo of a small {}. / This is a photo of a medium {}. / This is a photo of a large {}.
/ a {} in the scene. / a photo of a {} in the scene. / There is a {} in the scene. / There is the {} in the scene.
/ This is a {} in the scene. / This is the {} in the scene. / This is one {} in the scene.""".replace("\n", " ").split(" / ")


@pytest.fixture
def published(tiny_config: ModelConfig, tiny_clip: FrozenClip) -> LDVC:
    return LDVC(replace(tiny_config, decoder="zegclip", recipe="published", text_prompts=False), tiny_clip).eval()


@torch.no_grad()
def features_of(clip: FrozenClip, patch_tokens: Tensor, class_tokens: int, position: Tensor) -> Tensor:
    """(B, 1 + N, d): open_clip's own blocks on patch tokens."""
    visual = clip.visual
    tokens = torch.cat([visual.class_embedding.expand(len(patch_tokens), 1, -1), patch_tokens.flatten(2).mT], dim=1) + position
    tokens[:, 0] += (class_tokens - 1) * visual.class_embedding
    tokens = visual.ln_pre(tokens)
    for block in visual.transformer.resblocks:
        tokens = block(tokens)
    return visual.ln_post(tokens) @ visual.proj


@torch.no_grad()
def test_d1_the_class_token_counts_twice(tiny_clip: FrozenClip) -> None:
    tower, patch_tokens = ImageTower(tiny_clip, prompts=0, recipe=PUBLISHED), torch.randn(2, 64, 4, 4)
    for prompted, times in ((True, 2), (False, 1)):
        found = tower(patch_tokens=patch_tokens, prompted=prompted)
        expected = features_of(tiny_clip, patch_tokens, times, tiny_clip.visual.positional_embedding)
        torch.testing.assert_close(found.global_embedding, expected[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.patch_features, expected[:, 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_d2_pictures_have_the_statistics_of_imagenet(published: LDVC, tiny_clip: FrozenClip) -> None:
    """Plain CLIP beside it keeps those of the CLIP, so the two do not share an encoded photo."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1).float()
    mean, std = (value[:, None, None] for value in IMAGENET)
    expected = {
        "zegclip": tiny_clip.visual.conv1((pixels - mean)[None] / std),
        "clip": tiny_clip.visual.conv1(((pixels / 255 - 0.5) / 0.5)[None]),
    }
    states = {}
    for decoder, tokens in expected.items():
        predictor = Predictor(published, {"inference": {"long_side": 80}}, decoder=decoder, device="cpu")
        states[decoder] = predictor.encode_image(picture)
        torch.testing.assert_close(states[decoder].patch_tokens[0], tokens, atol=1e-4, rtol=1e-4)
    assert states["zegclip"].encoder_id != states["clip"].encoder_id
    images = ((pixels / 255 - 0.5) / 0.5)[None]  # as training passes them on
    torch.testing.assert_close(published.image_tower.embed_patches(images), expected["zegclip"], atol=1e-4, rtol=1e-4)


def test_d3_sentences_are_the_authors(tiny_clip: FrozenClip, tiny_config: ModelConfig) -> None:
    for setting in ("inductive", "transductive", "fully_supervised"):
        voc, coco = (load_config(f"{each}_{setting}", decoder="zegclip").model for each in ("voc12", "coco_stuff"))
        assert voc.templates == ("a photo of a {}",) and list(coco.templates) == SENTENCES and len(SENTENCES) == 15
    assert load_config("coco_stuff_inductive", decoder="ldvc").model.template == "a photo of a {}."
    stored = json.loads(json.dumps(coco.to_dict()))
    assert ModelConfig.from_dict(stored) == coco
    with pytest.raises(CheckpointError, match="text_prompts need one template"):
        ModelConfig.from_dict(stored | {"text_prompts": True})

    names = ["dog", "potted plant", "sky"]
    tokens = [tiny_clip.tokenizer([sentence.format(name) for name in names]) for sentence in SENTENCES]
    parts = [tiny_clip.model.encode_text(each, normalize=True) for each in tokens]
    expected = F.normalize(torch.stack(parts).mean(dim=0), dim=-1)
    model = LDVC(replace(tiny_config, decoder="zegclip", template=tuple(SENTENCES), text_prompts=False), tiny_clip).eval()
    torch.testing.assert_close(F.normalize(model.encode_names(names), dim=-1), expected, atol=1e-5, rtol=1e-5)
    assert not [name for name, _ in model.text_tower.named_parameters()] and not model.text_tower.state_dict()


def test_d3_training_learns_with_the_mean_of_the_sentences(published: LDVC, tiny_clip: FrozenClip, tmp_path: Path) -> None:
    published.text_tower = TextTower(tiny_clip, SENTENCES[:3], prompts=False)
    vocabulary = Vocabulary([FolderDataset(make_set(tmp_path / "x", ["grass", "sky"]))])
    config = TrainConfig(sets={"x": 1.0}, model=published.config)
    objective = Objective(published, vocabulary, [], config)
    batch = {"patch_tokens": torch.randn(1, 64, 4, 4), "labels": torch.zeros(1, 16, 16).short(), "set": torch.tensor([0])}
    found = objective(batch, torch.arange(2), torch.zeros(0, dtype=torch.int64))
    logits = published(None, ["grass", "sky"], patch_tokens=batch["patch_tokens"]).mask_logits
    expected = mask_loss(logits, batch["labels"], torch.ones(1, 2).bool(), void_is_negative=True)
    assert found["focal"].item() == pytest.approx(100 * expected.focal.item(), rel=1e-4)


def test_d4_everything_has_weight_decay(published: LDVC) -> None:
    config = TrainConfig(sets={"x": 1.0}, model=published.config)
    groups = parameter_groups(published, config)
    assert {group["weight_decay"] for group in groups} == {0.01} and {group["peak"] for group in groups} == {2e-4}
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in published.parameters() if parameter.requires_grad)


@torch.no_grad()
def test_d6_positions_are_resampled_bilinearly(tiny_clip: FrozenClip) -> None:
    tower, patch_tokens = ImageTower(tiny_clip, prompts=0, recipe=PUBLISHED), torch.randn(1, 64, 9, 7)
    embedding = tiny_clip.visual.positional_embedding
    patches = embedding[1:].T.reshape(1, 64, 4, 4)
    position = torch.cat([embedding[:1], F.interpolate(patches, size=(9, 7), mode="bilinear")[0].flatten(1).T])
    expected = features_of(tiny_clip, patch_tokens, 2, position)
    torch.testing.assert_close(tower(patch_tokens=patch_tokens).patch_features, expected[:, 1:], atol=1e-5, rtol=1e-5)
    plain = tower(patch_tokens=patch_tokens, prompted=False).patch_features
    assert torch.equal(plain, ImageTower(tiny_clip, prompts=0)(patch_tokens=patch_tokens).patch_features)


def test_d7_small_photos_are_padded_on_the_right_and_below() -> None:
    """With the mean colour of ImageNet, which normalisation turns into 0; also where the photo is mirrored."""
    padding = load_config("voc12_inductive").augmentation().padding
    assert load_config("lite").augmentation().padding is None
    assert ((torch.tensor(padding) - IMAGENET[0]).abs() / IMAGENET[1]).max() < 0.01, "rounded to whole numbers"
    photo = np.zeros((20, 30, 3), dtype=np.uint8)
    photo[:, :15] = 255
    mask = np.repeat([[1, 2]], [15, 15], axis=1).repeat(20, axis=0).astype(np.uint8)
    size = {"crop": 48, "short_side": 20, "scale": (1.0, 1.0), "photometric": 0.0}
    mirrored = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        view, labels = random_view(Image.fromarray(photo), mask, Augmentation(padding=padding, **size), generator)
        assert (view[20:] == padding).all() and (view[:, 30:] == padding).all()
        assert (labels[20:] == 255).all() and (labels[:, 30:] == 255).all()
        left = labels[0, 0]
        mirrored += left == 2
        assert (labels[:20, :15] == left).all() and (labels[:20, 15:30] == 3 - left).all()
        assert (view[:20, :15] == (255 if left == 1 else 0)).all()
    assert 4 < mirrored < 16


def test_d8_the_first_step_of_the_warm_up_is_zero() -> None:
    """mmcv's linear warm-up from the ratio 1e-6: step i has the factor i / 1500. Then its polynomial schedule."""
    config = load_config("voc12_inductive")
    for step in (0, 1, 749, 1499, 10_000, 19_999):
        regular = 1e-6 + (2e-4 - 1e-6) * (1 - step / 20_000) ** 0.9
        expected = regular * (1 - max(0, 1 - step / 1500) * (1 - 1e-6))
        assert learning_rate(2e-4, step, config) == pytest.approx(expected, rel=1e-9)
    assert learning_rate(1e-7, 19_999, config) == pytest.approx(1e-7)
    ours = replace(config, model=replace(config.model, recipe="clip_start"))
    assert learning_rate(2e-4, 0, ours) == pytest.approx(2e-4 / 1500, rel=2e-3)


def test_d10_prompt_projection_and_norm_start_as_the_authors(tiny_clip: FrozenClip) -> None:
    """The norm is on the output of the last block (tests/test_towers.py compares the whole tower)."""
    tower = ImageTower(tiny_clip, prompts=3, recipe=PUBLISHED)
    bias = tower.prompt_projection.bias.abs() * 64**0.5
    assert bias.max() <= 1 and 0.3 < bias.mean() < 0.7, "uniform up to 1 / sqrt(inputs)"
    assert tower.prompt_norm.eps == 1e-6 and tower.gate is None
    ours = ImageTower(tiny_clip, prompts=3)
    assert not ours.prompt_projection.bias.any() and ours.prompt_norm.eps == 1e-5


def test_d11_there_is_at_least_one_mask_per_process() -> None:
    """max(masks of all processes / processes, 1): here one mask for four processes."""
    labels = torch.full((1, 4, 4), BACKGROUND)
    labels[0, 0] = 0
    logits, annotated = torch.randn(1, 2, 4, 4), torch.ones(1, 2, dtype=torch.bool)
    alone = mask_loss(logits, labels, annotated, normalise="masks")
    for everywhere, count in ((1, 1), (4, 1), (12, 3)):
        four = Processes(total=lambda value, everywhere=everywhere: torch.full_like(value, everywhere), count=4)
        found = mask_loss(logits, labels, annotated, normalise="masks", processes=four)
        assert found.focal.item() == pytest.approx(alone.focal.item() / count, rel=1e-5)
        assert found.dice.item() == pytest.approx(alone.dice.item() / count, rel=1e-5)
