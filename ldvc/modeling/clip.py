"""The frozen CLIP: built by its name in open_clip, from a file, or from a folder of this project.

A folder of this project holds `config.json`::

    {"architecture": {"embed_dim": ..., "vision_cfg": {...}, "text_cfg": {...}, "init_logit_bias": ...},
     "patch_embed": {...} or null,             keyword arguments of ConvPatchEmbed, which then replaces `visual.conv1`
     "mean": [r, g, b], "std": [r, g, b]}      how pictures are normalised

and weights in the format of `ldvc.weights`: half precision on disk, float32 in memory. A folder may hold only the tensors that
differ from another CLIP. Its `config.json` is then `{"base": "../other"}`, a path relative to the folder.

Files of weights under other names are found and read by `ldvc.modeling.clip_weights`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from ldvc.bundled import ASSETS
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.modeling.clip_weights import find_pretrained, is_architecture, read_weights, weight_file
from ldvc.weights import load_tensors, read_json, replaced_files, save_tensors, write_json

LITE_FOLDER = ASSETS / "lite"

# A CLIP that was trained with a softmax has no bias, but masks are sigmoids of each class and need one. Cosines of OpenAI's
# CLIP are about 0.25 to 0.3 for matching pairs of image and text and 0.1 to 0.2 for others, so a class counts as present above
# this cosine at the start of training. The decoder learns its own bias. The paper does not specify it.
NEUTRAL_COSINE = 0.25

NO_LITE = f"The lite model is not at {LITE_FOLDER}; fetch the whole project, with its assets folder."
ANOTHER = "use one such as 'ViT-B-16-quickgelu'"
MAX_LAYERS = 200  # of a tower; more would take long to build


class FrozenClip(nn.Module):
    """An open_clip model without gradients, always in evaluation mode.

    The similarity of patch and name is the sigmoid of `scale * cosine + bias`.
    """

    def __init__(
        self, model: CLIP | CustomTextCLIP, tokenizer: Callable[..., Tensor], *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        _check_supported(model)
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer  # list of strings -> (len, context length) token ids
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))  # of pictures with values in 0..1
        self.patch_size = int(model.visual.patch_size[0])  # pixels per patch side
        self.embed_dim = int(model.visual.proj.shape[1])  # d, the joint width
        self.scale = model.logit_scale.exp().item()
        self.bias = -self.scale * NEUTRAL_COSINE if model.logit_bias is None else model.logit_bias.item()

    def train(self, mode: bool = True) -> "FrozenClip":
        """Stay in evaluation mode, whatever the mode of the whole model."""
        return super().train(False)

    @property
    def visual(self) -> VisionTransformer:
        return self.model.visual

    @property
    def text(self) -> CLIP | TextTransformer:
        """The module that holds the parts of the text tower, under the same names in both of open_clip's layouts."""
        return self.model if isinstance(self.model, CLIP) else self.model.text


def build_clip(clip: str, pretrained: str | None = None) -> FrozenClip:
    """Build a frozen CLIP.

    Args:
        clip: open_clip architecture ("ViT-B-16-quickgelu"), a folder of this project or of open_clip, or "lite".
        pretrained: for an architecture: tag ("openai"), local file, folder with a file of weights, or None for random
            weights (tests).

    Raises:
        WeightsNotFoundError: weights cannot be found or downloaded, or the architecture is unknown.
        CheckpointError: weights do not fit the architecture, or were trained with another activation.
        LdvcError: the architecture is not a plain ViT with a causal text transformer.
    """
    folder = LITE_FOLDER / "clip" if clip == "lite" else Path(clip)
    if (folder / "config.json").is_file():
        return _build_from_folder(folder)
    if clip == "lite":
        raise WeightsNotFoundError(NO_LITE)
    if (folder / "open_clip_config.json").is_file():
        config = read_json(folder / "open_clip_config.json")
        state = read_weights(weight_file(folder))
        model = _build_fitting(config.get("model_cfg"), state, source=folder)
        _load_state(model, state, source=folder)
        return _freeze(model, config["model_cfg"], config.get("preprocess_cfg") or {})
    if not is_architecture(clip):
        raise WeightsNotFoundError(
            f"There is no CLIP called {clip!r}: give a folder with config.json, 'lite', or one of open_clip's "
            "architectures such as 'ViT-B-16-quickgelu'."
        )

    architecture = open_clip.get_model_config(clip)
    weights, preprocess = (None, {}) if pretrained is None else find_pretrained(clip, pretrained)
    state = None if weights is None else read_weights(weights)
    model = _build_architecture(architecture)
    if state is not None:
        _load_state(model, state, source=weights)
    return _freeze(model, architecture, preprocess)


def save_clip_folder(model: nn.Module, folder: str | Path, config: Mapping[str, Any]) -> list[Path]:
    """Write an open_clip model, with its patch embedding in place, as a folder that `build_clip` reads.

    `config` holds "architecture", "patch_embed", "mean" and "std", or "base"; see the docstring of this module.
    """
    folder, state = Path(folder), model.state_dict()
    if "base" in config:
        base = load_tensors((folder / config["base"]).resolve())  # resolved: the folder may not exist yet
        state = {name: tensor for name, tensor in state.items() if not torch.equal(_stored(tensor), base[name])}
    with replaced_files(folder) as new:
        files = save_tensors(state, new, dtype=torch.float16)
        write_json(new / "config.json", dict(config))
    return [folder / file.name for file in files]


def _stored(tensor: Tensor) -> Tensor:
    """A tensor as a folder stores it: matrices are rounded to half precision."""
    tensor = tensor.detach().cpu()
    return tensor.half().float() if tensor.is_floating_point() and tensor.ndim >= 2 else tensor


def _build_from_folder(folder: Path) -> FrozenClip:
    config = read_json(folder / "config.json")
    if "base" in config:
        base = (folder / str(config["base"])).resolve()
        if not (base / "config.json").is_file():
            raise WeightsNotFoundError(f"The CLIP in {folder} needs the one at {base}, which is missing; copy both folders.")
        config, state = read_json(base / "config.json"), load_tensors(base) | load_tensors(folder)
    else:
        state = load_tensors(folder)
    if "architecture" not in config:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a CLIP: it has no 'architecture'.")
    patch_embed = config.get("patch_embed")
    model = _build_fitting(config["architecture"], state, source=folder, replaces_conv1=patch_embed is not None)
    if patch_embed is not None:
        # imported here, because timm is slow to import and a plain ViT does not need it
        import timm

        from ldvc.modeling.conv_patch_embed import ConvPatchEmbed

        if not isinstance(patch_embed, dict) or not timm.is_model(str(patch_embed.get("backbone", "tf_efficientnet_lite2"))):
            raise CheckpointError(f"{folder / 'config.json'} names no patch embedding of timm: {patch_embed}.")
        vision = config["architecture"]["vision_cfg"]
        try:
            model.visual.conv1 = ConvPatchEmbed(vision["width"], patch_size=vision["patch_size"], **patch_embed)
        except (AssertionError, TypeError) as error:
            raise CheckpointError(f"{folder / 'config.json'} holds a patch_embed that cannot be built: {error}.") from error
    _load_state(model, state, source=folder)
    return _freeze(model, config["architecture"], config)


def _build_fitting(
    architecture: Any, state: Mapping[str, Tensor], *, source: Path, replaces_conv1: bool = False
) -> CLIP | CustomTextCLIP:
    """Build an architecture and check its shapes against `state`, first without memory, so that absurd sizes cost nothing.

    With `replaces_conv1`, `visual.conv1` will be replaced and is not compared.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in _build_architecture(architecture).state_dict().items()}
    for name, shape in shapes.items():
        if (name not in state or state[name].shape != shape) and not (replaces_conv1 and name.startswith("visual.conv1.")):
            actual = tuple(state[name].shape) if name in state else "nothing"
            raise CheckpointError(
                f"The weights in {source} do not fit the architecture: {name} must have the shape {tuple(shape)}, not "
                f"{actual}; use the configuration that was saved with them."
            )
    return _build_architecture(architecture)


def _build_architecture(architecture: Any) -> CLIP | CustomTextCLIP:
    """An open_clip model with random weights from its configuration dictionary."""
    parts = [architecture.get(part) for part in ("vision_cfg", "text_cfg")] if isinstance(architecture, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError("The CLIP configuration is not one of open_clip: it needs 'vision_cfg' and 'text_cfg'.")
    vision, text = parts
    if vision.get("timm_model_name") or text.get("hf_model_name") or "multimodal_cfg" in architecture:
        raise LdvcError(f"This CLIP is not one of open_clip's own ViTs; {ANOTHER}.")
    layers = [part.get("layers", 12) for part in parts]
    if any(type(count) is int and count > MAX_LAYERS for count in layers):
        raise CheckpointError(f"The CLIP configuration asks for {max(layers)} layers; at most {MAX_LAYERS} are possible.")
    arguments = {key: value for key, value in architecture.items() if key != "custom_text"}
    try:
        return (CustomTextCLIP if architecture.get("custom_text") else CLIP)(**arguments)
    except Exception as error:  # open_clip raises many types for sizes that do not fit each other
        version = open_clip.__version__
        raise CheckpointError(f"The CLIP configuration is not one of open_clip {version}: {error}.") from error


def _freeze(model: CLIP | CustomTextCLIP, architecture: Mapping[str, Any], preprocess: Mapping[str, Any]) -> FrozenClip:
    """A frozen CLIP with its tokenizer. "mean" and "std" are those of `preprocess`, or else of OpenAI's CLIP."""
    text = architecture["text_cfg"]
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if text.get("hf_tokenizer_name"):
        raise LdvcError("This CLIP has another tokenizer; use one with CLIP's tokenizer, such as 'ViT-B-16-quickgelu'.")
    options = text.get("tokenizer_kwargs") or {}
    mean = preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = preprocess.get("std") or open_clip.OPENAI_DATASET_STD
    try:
        valid = len(mean) == len(std) == 3 and all(abs(value) < 100 for value in mean) and all(0 < value < 100 for value in std)
    except TypeError:
        valid = False
    if not valid or "bpe_path" in options:
        raise CheckpointError(
            f"The CLIP configuration needs three numbers each as mean and std, and no 'bpe_path', not {mean}, {std}, {options}."
        )
    return FrozenClip(model, open_clip.SimpleTokenizer(context_length=length, **options), mean=mean, std=std)


def _load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"The weights in {source} do not fit the architecture: {reason}") from error


def _check_supported(model: CLIP | CustomTextCLIP) -> None:
    """Prompts at every layer need plain blocks, a class token and a causal text tower."""
    visual, text = model.visual, model if isinstance(model, CLIP) else model.text
    plain_vision = isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"
    plain_text = isinstance(text, (CLIP, TextTransformer)) and getattr(text, "cls_emb", None) is None
    if not plain_vision or visual.proj is None:
        raise LdvcError(f"The image tower of this CLIP is not a ViT with a class token; {ANOTHER}.")
    if not plain_text or text.attn_mask is None:
        raise LdvcError(f"The text tower of this CLIP is not a causal transformer; {ANOTHER}.")
    blocks = [*visual.transformer.resblocks, *text.transformer.resblocks]
    if not all(isinstance(block, ResidualAttentionBlock) for block in blocks):
        raise LdvcError(f"This CLIP has other transformer blocks; {ANOTHER}.")
