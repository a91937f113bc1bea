"""Dense CLIP without training: each reading against its formulas; templates and their cache; a CLIP without a decoder."""

import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional as F

from ldvc import Predictor
from ldvc.calibration import Calibration, SoftmaxCalibration
from ldvc.class_names import ClassName
from ldvc.config import STUFF, PlainClipSettings
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.inference import Window
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.dense import dense_features
from ldvc.modeling.towers import ImageTower
from ldvc.name_embeddings import TEMPLATES, TemplateEnsemble
from tests.results import make_result, random_photo
from tests.tiny import ARCHITECTURE, name_tiny_clip, save_tiny_checkpoint

SIZES = {"native": (6, 6), "odd": (5, 7), "tall": (9, 4)}


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    """12 blocks, as the published readings expect; tokens far apart, so that the threshold of similarity matters."""
    torch.manual_seed(0)
    vision = {"image_size": 96, "layers": 12, "width": 32, "head_width": 16, "patch_size": 16}
    model = CLIP(**(deepcopy(ARCHITECTURE) | {"vision_cfg": vision}))
    with torch.no_grad():
        model.visual.proj.normal_(std=0.2)
        model.visual.positional_embedding.normal_(std=0.5)
        for block in model.visual.transformer.resblocks:
            block.attn.in_proj_bias.normal_(std=0.1)
            block.attn.out_proj.bias.normal_(std=0.1)
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=24), mean=(0.5,) * 3, std=(0.5,) * 3)


# ---- references written from the formulas ---------------------------------------------------------------------------------


def cubic_weights(new: int, old: int) -> Tensor:
    """(new, old): bicubic interpolation with a = -0.75 by the factor (new + 0.1) / old."""
    weights, a = torch.zeros(new, old), -0.75
    for place in range(new):
        at = (place + 0.5) * old / (new + 0.1) - 0.5
        for i in range(math.floor(at) - 1, math.floor(at) + 3):
            x = abs(at - i)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[place, min(max(i, 0), old - 1)] += near if x <= 1 else far
    return weights


def reference_states(clip: FrozenClip, patches: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """x_1 .. x_11 of one picture, each (1 + N, width), by open_clip's own blocks; `patches` is (width, h, w)."""
    embedding, native = clip.visual.positional_embedding.detach(), tuple(clip.visual.grid_size)
    if grid != native:
        rows, columns = (cubic_weights(new, old) for new, old in zip(grid, native, strict=True))
        resampled = torch.einsum("yi,xj,ijc->yxc", rows, columns, embedding[1:].unflatten(0, native))
        embedding = torch.cat([embedding[:1], resampled.flatten(0, 1)])
    tokens = torch.cat([clip.visual.class_embedding[None], patches.flatten(1).T]) + embedding
    tokens, found = clip.visual.ln_pre(tokens)[None], []
    for block in clip.visual.transformer.resblocks[:-1]:
        tokens = block(tokens)
        found.append(tokens[0])
    return found


def reference_attention(clip: FrozenClip, tokens: Tensor, bias: Tensor | float, extra: Tensor | None = None) -> list[Tensor]:
    """W_o (A v) and A, the mean of both heads, in the last block; A = softmax(k k^T / sqrt(d_head) + bias), averaged with
    `extra`."""
    block = clip.visual.transformer.resblocks[-1]
    _, keys, values = F.linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    weights = [(key @ key.T / 4 + bias).softmax(dim=-1) for key in keys.split(16, dim=-1)]
    weights = weights if extra is None else [(each + extra) / 2 for each in weights]
    mixed = [each @ value for each, value in zip(weights, values.split(16, dim=-1), strict=True)]
    return [block.attn.out_proj(torch.cat(mixed, dim=-1)), sum(weights) / 2]


def reference_naclip(clip: FrozenClip, states: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(1 + N, width) before ln_post, and the attention (N, N) of patches."""
    places = torch.cartesian_prod(*(torch.arange(side).float() for side in grid))
    window = torch.exp(-(places[:, None] - places).square().sum(dim=-1) / 50)
    tokens, attention = reference_attention(clip, states[-1], F.pad(window, (1, 0, 1, 0)))
    return tokens, attention[1:, 1:]


def reference_outliers(patches: Tensor) -> list[int]:
    """Patches whose mean ratio of squared distances to the last neighbour is beyond the 95th percentile."""
    squared = (patches[:, None] - patches).double().square().sum(dim=-1)
    near = squared.argsort(dim=1)[:, 1:31]
    reach = squared.gather(1, near[:, -1:])[:, 0]
    factor = (reach[:, None] / reach[near]).mean(dim=1)
    return (factor > factor.quantile(0.95)).nonzero().flatten().tolist()


def reference_mended(patches: Tensor, bad: list[int], grid: tuple[int, int]) -> Tensor:
    found = patches.clone()
    for place in bad:
        y, x = divmod(place, grid[1])
        around = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        good = {i * grid[1] + j for i, j in around if 0 <= i < grid[0] and 0 <= j < grid[1]} - set(bad)
        if good:
            found[place] = patches[list(good)].mean(dim=0)
    return found


def reference_averaged(tokens: Tensor, similarity: Tensor) -> Tensor:
    weights = similarity.where(similarity >= 0.4, 0.0)
    return weights @ tokens / (weights.sum(dim=1, keepdim=True) + 1e-6)


def reference_sc_clip(clip: FrozenClip, states: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(N, width) before ln_post, and the attention (N, N)."""
    x4, x9, x11 = states[3], states[8], states[10]
    bad = reference_outliers(x11[1:])
    patches = (reference_mended(x9[1:], bad, grid), x4[1:])
    similarity, early = (F.cosine_similarity(each[:, None], each, dim=-1) for each in patches)
    shifted = 3 * (similarity - similarity.mean())
    similar = shifted.where(shifted >= 0, -math.inf).softmax(dim=-1)

    def read(patches: Tensor, class_token: Tensor) -> tuple[Tensor, Tensor]:
        found, attention = reference_attention(clip, patches, 0.0, similar)
        return reference_averaged(found + 0.3 * class_token, early), attention

    found, attention = read(reference_averaged(reference_mended(x11[1:], bad, grid), similarity), x11[0])
    added = sum(states[3:10])
    return found + read(added[1:], added[0])[0], attention


@pytest.mark.parametrize("grid", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("reading", ["naclip", "sc_clip"])
@torch.no_grad()
def test_readings_are_their_formulas(clip: FrozenClip, reading: str, grid: tuple[int, int]) -> None:
    """Two pictures at once, so that nothing is shared between them; "odd" and "tall" need other positions."""
    tower = ImageTower(clip, prompts=0)
    patches = torch.randn(2, 32, *grid)
    found = dense_features(tower, patches, reading, attention=True)
    assert found.grid == grid and found.patch_features.shape == (2, math.prod(grid), 32)
    plain = dense_features(tower, patches).patch_features
    for number in range(2):
        states = reference_states(clip, patches[number], grid)
        tokens, attention = (reference_naclip if reading == "naclip" else reference_sc_clip)(clip, states, grid)
        embeddings = clip.visual.ln_post(tokens) @ clip.visual.proj
        torch.testing.assert_close(found.patch_features[number], embeddings[-math.prod(grid) :], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.patch_attention[number], attention, atol=1e-5, rtol=0)
        if reading == "naclip":
            torch.testing.assert_close(found.global_embedding[number], embeddings[0], atol=1e-4, rtol=0)
        assert (plain[number] - found.patch_features[number]).abs().max() > 0.1
    alone = dense_features(tower, patches[:1], reading)
    torch.testing.assert_close(alone.patch_features, found.patch_features[:1], atol=1e-5, rtol=0)
    assert alone.patch_attention is None
    for small in (torch.randn(1, 32, 1, 1), torch.zeros(1, 32, *grid)):
        assert dense_features(tower, small, reading).patch_features.isfinite().all()


@torch.no_grad()
def test_plain_is_the_tower_to_the_bit(clip: FrozenClip) -> None:
    tower = ImageTower(clip, prompts=2)
    patches = torch.randn(2, 32, 3, 5)
    found, expected = dense_features(tower, patches, attention=True), tower(patch_tokens=patches, prompted=False)
    assert torch.equal(found.patch_features, expected.patch_features)
    assert torch.equal(found.global_embedding, expected.global_embedding)
    states = tower.first_tokens(patches)
    *blocks, last = clip.visual.transformer.resblocks
    for block in blocks:
        states = block(states)
    normed = last.ln_1(states)
    _, weights = last.attn(normed, normed, normed, need_weights=True)  # the mean over heads
    torch.testing.assert_close(found.patch_attention, weights[:, 1:, 1:], atol=1e-5, rtol=0)


# ---- names ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_templates_are_the_mean_of_open_clips_embeddings(clip: FrozenClip, tmp_path: Path) -> None:
    names = ["dog", "potted plant", "a very long name " * 9]
    assert len(TEMPLATES) == 80
    expected = []
    for name in names:
        tokens = clip.tokenizer([template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES])
        embeddings = F.normalize(clip.model.encode_text(tokens), dim=-1)
        expected.append(F.normalize(embeddings.mean(dim=0), dim=0))
    found = TemplateEnsemble(clip, folder=tmp_path)(names)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


def test_embeddings_on_disk(clip: FrozenClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "names"

    def encode(templates: tuple[str, ...] = TEMPLATES[:3], folder: Path = folder) -> Tensor:
        return TemplateEnsemble(clip, templates, folder)(["dog", "cat"])

    first = encode()
    files = sorted(folder.iterdir())
    assert len(files) == 2 and all(file.suffix == ".npy" for file in files)
    again = TemplateEnsemble(clip, TEMPLATES[:3], folder)
    with monkeypatch.context() as patch:
        patch.setattr(again, "encode", lambda names: pytest.fail("the embeddings are on disk"))
        assert torch.equal(again(["cat", "dog"]), first.flip(0))

    np.save(tmp_path / "nan.npy", np.full(32, np.nan, np.float32))
    np.save(tmp_path / "short.npy", np.ones(3))
    damaged = [b"", b"no array", files[0].read_bytes()[:-5], *(file.read_bytes() for file in tmp_path.glob("*.npy"))]
    for content in damaged:
        files[0].write_bytes(content)
        assert torch.allclose(encode(), first, atol=1e-6)
        assert np.load(files[0]).shape == (32,), "the damaged file was replaced"
    assert len(damaged) == 5 and torch.allclose(encode(folder=tmp_path / "nan.npy"), first, atol=1e-6), "it is no folder"
    assert not torch.allclose(encode(TEMPLATES[3:6]), first, atol=1e-3) and len(list(folder.iterdir())) == 4


# ---- scores and labels ------------------------------------------------------------------------------------------------------


def test_scores_are_a_softmax_with_the_best_stuff_word() -> None:
    """0 where that word is better; `test_result.py` tests the rule for labels."""
    cosines = torch.randn(4, 4, 6) * 0.03
    alone = make_result(cosines[:3], (64, 96), calibration=SoftmaxCalibration())
    np.testing.assert_allclose(alone.scores.sum(axis=0), 1, atol=1e-5)
    result = make_result(cosines[:3], (64, 96), calibration=SoftmaxCalibration(), background=0.4)
    result.outputs[0].stuff = cosines[3]
    expected = torch.where(cosines[:3] < cosines[3], 0, (40 * cosines).softmax(dim=0)[:3])
    np.testing.assert_allclose(result.scores_at((4, 6)), expected, atol=1e-5)
    np.testing.assert_allclose(result.patch_scores(3, 5), expected[:, 3, 5], atol=1e-5)
    assert set(np.unique(result.labels)) == {-1, 0, 1, 2}


def test_patch_attention_of_several_windows() -> None:
    windows = [Window(0, 0, 64, 64), Window(0, 32, 64, 64)]
    result = make_result([torch.zeros(1, 4, 4)] * 2, (64, 96), windows=windows)
    with pytest.raises(LdvcError, match="decoder 'clip'"):
        result.patch_attention(0, 0)
    for output in result.outputs:
        output.patch_attention = torch.rand(16, 16)
    first, second = (output.patch_attention.unflatten(1, (4, 4)) for output in result.outputs)
    left = result.patch_attention(1, 0)  # only in the first window
    assert left.shape == result.grid == (4, 6)
    np.testing.assert_allclose(left, F.pad(first[4], (0, 2)), atol=1e-6)
    overlap = (first[7][:, 2:] + second[5][:, :2]) / 2
    expected = torch.cat([first[7][:, :2], overlap, second[5][:, 2:]], dim=1)
    np.testing.assert_allclose(result.patch_attention(1, 3), expected, atol=1e-6)


# ---- predictors -------------------------------------------------------------------------------------------------------------


def test_a_clip_opens_without_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = name_tiny_clip(tmp_path, monkeypatch)
    predictor = Predictor.from_pretrained("full", decoder="clip", device="cpu")
    by_name = Predictor.from_pretrained(architecture, decoder="clip", device="cpu")
    assert by_name.weights_digest == predictor.weights_digest
    assert predictor.plain_clip.dense == "sc_clip"
    assert predictor.inference == {"short_side": 336, "window": 224, "stride": 112}
    stored = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert torch.equal(predictor.model.clip.model.state_dict()["visual.proj"], stored["visual.proj"])
    predictor.set_image(random_photo(200, 300))
    result = predictor.segment(["dog", "grass"])
    assert result.background == 0.15 and len(result.outputs) == 8 and result.grid == (21, 32)
    assert result.stuff == [word for word in STUFF if word != "grass"], "what is asked for is no stuff word"
    assert np.array_equal(result.labels, np.where(result.scores.max(axis=0) < 0.15, -1, result.scores.argmax(axis=0)))
    assert result.patch_attention(10, 15).shape == (21, 32)
    single = predictor.segment("dog")
    assert single.company == [] and 0 < single.scores.max() < 1
    with pytest.raises(CheckpointError, match=r"has no decoder 'zegclip', only 'clip': train one .* LDVC_FULL"):
        predictor.sibling("zegclip")
    with pytest.raises(CheckpointError, match="train one"):
        Predictor.from_pretrained("full")
    assert len(list((tmp_path / "cache" / "ldvc" / "names").iterdir())) == len({*STUFF, "dog"})
    monkeypatch.setenv("LDVC_CLIP_WEIGHTS", str(tmp_path / "gone.pt"))
    with pytest.raises(WeightsNotFoundError, match="There is no file .*gone.pt, which LDVC_CLIP_WEIGHTS names"):
        Predictor.from_pretrained("full", decoder="clip")
    monkeypatch.delenv("LDVC_CLIP_WEIGHTS")
    with pytest.raises(WeightsNotFoundError, match="open_clip has no weights"):
        Predictor.from_pretrained(architecture, decoder="clip")


def test_the_settings_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sibling "clip" with other sizes encodes the photo once for itself, and decoders keep their sigmoids."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {"dense": "sc_clip", "inference": {"short_side": 96, "window": 64, "stride": 32}}
    settings |= {"templates": 80, "softmax_scale": 40, "threshold": 0.2, "stuff": ["sky"]}
    folder = save_tiny_checkpoint(tmp_path / "model", decoders=("ldvc",), metadata={"plain_clip": settings})
    decoder = Predictor.from_pretrained(str(folder), device="cpu")
    clip = decoder.sibling("clip")
    state, original, encoded = decoder.set_image(random_photo()), clip.encode_image, []
    monkeypatch.setattr(clip, "encode_image", lambda picture: encoded.append(picture) or original(picture))
    for _ in range(2):
        result = clip.segment("dog, cat", image=state)
    assert len(encoded) == 1 and len(result.outputs) > 1 and result.background == 0.2 and result.stuff == ["sky"]
    assert result.classes == [ClassName(("dog",)), ClassName(("cat",))]
    assert decoder.segment("dog, cat").stuff == [] and decoder.inference == {"long_side": 448}
    plain = Predictor(decoder.model, {}, decoder="clip", device="cpu")
    assert plain.plain_clip == PlainClipSettings() and plain.plain_clip.dense == "plain"
    assert isinstance(plain.calibration, Calibration) and plain.inference == {"long_side": 448}
