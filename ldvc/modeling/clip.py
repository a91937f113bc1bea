"""The frozen CLIP: built by open_clip's name, from a file, or from a folder of this project.

A folder of this project holds `config.json`::

    {"architecture": {"embed_dim": ..., "vision_cfg": {...}, "text_cfg": {...}, "init_logit_bias": ...},
     "patch_embed": {...} or null,             keyword arguments of ConvPatchEmbed, which then replaces `visual.conv1`
     "mean": [r, g, b], "std": [r, g, b]}      how pictures are normalised

and weights in the format of `ldvc.weights`: half precision on disk, float32 in memory. A CLIP that differs from another one
in some tensors holds only these; its `config.json` is `{"base": "../other"}`, a path relative to its folder.
"""

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from ldvc.bundled import ASSETS
from ldvc.errors import CheckpointError, LdvcError, WeightsNotFoundError
from ldvc.weights import MAX_SHARD_BYTES, hub_reachable, load_tensors, save_tensors

LITE_FOLDER = ASSETS / "lite"

# A CLIP that was trained with a softmax has no bias, but masks are sigmoids of each class and need one. Cosines of OpenAI's
# CLIP are about 0.25 to 0.3 for matching pairs of image and text and 0.1 to 0.2 for others, so a class is "present" above this
# cosine at the start of training. The decoder learns its own bias. The paper does not specify it.
NEUTRAL_COSINE = 0.25

FULL_CLIP = "ViT-B-16-quickgelu"  # with OpenAI's weights, the CLIP of the paper
WEIGHTS_VARIABLE = "LDVC_CLIP_WEIGHTS"  # environment: a local file with the weights of the tag "openai"

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")


class TextParts(NamedTuple):
    """The parts of the text tower, for both of open_clip's layouts (`CLIP` and `CustomTextCLIP`)."""

    token_embedding: nn.Embedding
    positional_embedding: Tensor  # (context length, width)
    blocks: nn.ModuleList
    ln_final: nn.Module
    projection: nn.Linear | Tensor | None
    pool_type: str
    eos_id: int | None


class FrozenClip(nn.Module):
    """An open_clip model without gradients, always in evaluation mode.

    Attributes:
        model: the open_clip model.
        tokenizer: list of strings -> (len, context length) token ids.
        mean, std: normalisation of pictures with values in 0..1, three floats each.
        patch_size: pixels per patch side.
        embed_dim: d, the joint width.
        scale, bias: the similarity of patch and name is the sigmoid of `scale * cosine + bias`. If the CLIP has no bias, it
            is `-scale * NEUTRAL_COSINE`.
    """

    def __init__(
        self,
        model: CLIP | CustomTextCLIP,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        _check_supported(model)
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.patch_size = int(model.visual.patch_size[0])
        self.embed_dim = int(model.visual.proj.shape[1])
        self.scale = model.logit_scale.exp().item()
        self.bias = -self.scale * NEUTRAL_COSINE if model.logit_bias is None else model.logit_bias.item()

    def train(self, mode: bool = True) -> "FrozenClip":
        """Stay in evaluation mode, whatever the mode of the whole model."""
        return super().train(False)

    @property
    def visual(self) -> VisionTransformer:
        return self.model.visual

    @property
    def text(self) -> TextParts:
        model = self.model
        if isinstance(model, CLIP):
            pool_type, eos_id = model.text_pool_type, model.text_eos_id
        else:
            model = model.text
            pool_type, eos_id = model.pool_type, model.eos_id
        return TextParts(
            token_embedding=model.token_embedding,
            positional_embedding=model.positional_embedding,
            blocks=model.transformer.resblocks,
            ln_final=model.ln_final,
            projection=model.text_projection,
            pool_type=pool_type,
            eos_id=eos_id,
        )


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
        raise WeightsNotFoundError(
            f"The lite model is not at {folder}; fetch the whole project, with its assets folder."
        )
    if (folder / "open_clip_config.json").is_file():
        config = _read_json(folder / "open_clip_config.json")
        model = _build_architecture(config["model_cfg"])
        _load_file(model, _weight_file(folder))
        preprocess = config.get("preprocess_cfg", {})
        return _freeze(model, config["model_cfg"], mean=preprocess.get("mean"), std=preprocess.get("std"))
    if not is_architecture(clip):
        raise WeightsNotFoundError(
            f"There is no CLIP called {clip!r}: give a folder with config.json, 'lite', or one of open_clip's "
            "architectures such as 'ViT-B-16-quickgelu'."
        )

    architecture = open_clip.get_model_config(clip)
    weights, preprocess = _find_pretrained(clip, pretrained) if pretrained is not None else (None, {})
    model = _build_architecture(architecture)
    if weights is not None:
        _load_file(model, weights)
    return _freeze(model, architecture, mean=preprocess.get("mean"), std=preprocess.get("std"))


def save_clip_folder(
    model: nn.Module,
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write an open_clip model as a folder that `build_clip` reads.

    Args:
        model: the open_clip model, with its patch embedding in place.
        folder: created if it does not exist.
        config: "architecture", "patch_embed", "mean", "std", or "base"; see the docstring of this module.
        max_shard_bytes: see `ldvc.weights.save_tensors`.
    """
    folder, state = Path(folder), model.state_dict()
    if "base" in config:
        base = load_tensors((folder / config["base"]).resolve())  # resolved: the folder may not exist yet
        state = {name: tensor for name, tensor in state.items() if not torch.equal(_stored(tensor), base[name])}
    else:
        missing = {"architecture", "patch_embed", "mean", "std"} - set(config)
        assert not missing, f"the configuration of a CLIP folder lacks {sorted(missing)}"
    files = save_tensors(state, folder, dtype=torch.float16, max_shard_bytes=max_shard_bytes)
    text = json.dumps(dict(config), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return files


def _stored(tensor: Tensor) -> Tensor:
    """A tensor as a folder stores it: matrices are rounded to half precision."""
    tensor = tensor.detach().cpu()
    return tensor.half().float() if tensor.is_floating_point() and tensor.ndim >= 2 else tensor


def _build_from_folder(folder: Path) -> FrozenClip:
    config, state = _read_json(folder / "config.json"), load_tensors(folder)
    if "base" in config:
        base = (folder / str(config["base"])).resolve()
        if not (base / "config.json").is_file():
            raise WeightsNotFoundError(f"The CLIP in {folder} needs the one at {base}, which is missing; copy both folders.")
        config, state = _read_json(base / "config.json"), load_tensors(base) | state
    if "architecture" not in config:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a CLIP: it has no 'architecture'.")
    model = _build_architecture(config["architecture"])
    if config.get("patch_embed") is not None:
        # imported here, because timm is slow to import and a plain ViT does not need it
        from ldvc.modeling.conv_patch_embed import ConvPatchEmbed

        vision = config["architecture"]["vision_cfg"]
        model.visual.conv1 = ConvPatchEmbed(vision["width"], patch_size=vision["patch_size"], **config["patch_embed"])
    _load_state(model, state, source=folder)
    return _freeze(model, config["architecture"], mean=config.get("mean"), std=config.get("std"))


def _build_architecture(architecture: Mapping[str, Any]) -> CLIP | CustomTextCLIP:
    """An open_clip model with random weights from its configuration dictionary."""
    arguments = {key: value for key, value in architecture.items() if key != "custom_text"}
    vision, text = arguments.get("vision_cfg", {}), arguments.get("text_cfg", {})
    if vision.get("timm_model_name") or text.get("hf_model_name") or "multimodal_cfg" in arguments:
        raise LdvcError("This CLIP is not one of open_clip's own ViTs; use one such as 'ViT-B-16-quickgelu'.")
    try:
        return (CustomTextCLIP if architecture.get("custom_text") else CLIP)(**arguments)
    except TypeError as error:
        raise CheckpointError(
            f"The CLIP configuration is not one of open_clip {open_clip.__version__}: {error}."
        ) from error


def _freeze(
    model: CLIP | CustomTextCLIP, architecture: Mapping[str, Any], *, mean: Any = None, std: Any = None
) -> FrozenClip:
    text = architecture["text_cfg"]
    length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if text.get("hf_tokenizer_name"):
        raise LdvcError(
            "This CLIP has another tokenizer; use one with CLIP's tokenizer, such as 'ViT-B-16-quickgelu'."
        )
    return FrozenClip(
        model,
        open_clip.SimpleTokenizer(context_length=length, **(text.get("tokenizer_kwargs") or {})),
        mean=mean or open_clip.OPENAI_DATASET_MEAN,
        std=std or open_clip.OPENAI_DATASET_STD,
    )


def is_architecture(clip: str) -> bool:
    """Whether `clip` is one of open_clip's names."""
    return clip in open_clip.list_models()


def default_weights(clip: str) -> str:
    """Tag of the weights of an architecture: OpenAI's if there are such, otherwise the first in open_clip's list.

    Raises:
        WeightsNotFoundError: open_clip lists none that were trained with the activation of this architecture.
    """
    quick = open_clip.get_model_config(clip).get("quick_gelu", False)
    for tag in sorted(open_clip.list_pretrained_tags_by_model(clip), key=lambda tag: tag != "openai"):
        if open_clip.get_pretrained_cfg(clip, tag).get("quick_gelu", False) == quick:
            return tag
    raise WeightsNotFoundError(
        f"open_clip has no weights of {clip}; take another architecture, or give a local file by {WEIGHTS_VARIABLE}."
    )


def weights_here(clip: str, pretrained: str) -> bool:
    """Whether weights of an architecture need no download."""
    try:
        return _local_weights(clip, pretrained)[0] is not None
    except LdvcError:
        return False


def _find_pretrained(clip: str, pretrained: str) -> tuple[Path, Mapping[str, Any]]:
    """File of weights and preprocessing for a tag, a file or a folder; downloads only if the Hub can be reached."""
    found, tag = _local_weights(clip, pretrained)
    if found is not None:
        return found, tag
    error: Exception | None = None
    if hub_reachable():
        try:
            return Path(open_clip.download_pretrained(tag)), tag
        except Exception as problem:  # open_clip and the Hub's client raise many types
            error = problem
            logging.getLogger(__name__).info("download of %s / %s failed: %s", clip, pretrained, problem)
    raise WeightsNotFoundError(
        f"The weights {pretrained!r} of {clip} are not on this machine and cannot be downloaded: connect to the network "
        "once, or give the path of a local file of weights as `pretrained`, or use the bundled model 'lite'."
    ) from error


def _local_weights(clip: str, pretrained: str) -> tuple[Path | None, Mapping[str, Any]]:
    """File of weights on this machine, or None, and what open_clip says about them."""
    path = Path(pretrained).expanduser()
    named = os.environ.get(WEIGHTS_VARIABLE)
    if pretrained == "openai" and named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise WeightsNotFoundError(f"There is no file {named}, which {WEIGHTS_VARIABLE} names; correct it or unset it.")
    if path.is_file():
        return path, {}
    if path.is_dir():
        return _weight_file(path), {}
    tag = open_clip.get_pretrained_cfg(clip, pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(clip)) or "none"
        raise WeightsNotFoundError(
            f"{pretrained!r} is neither a file nor a folder nor a known set of weights for {clip} (known: {known})."
        )
    if tag.get("quick_gelu", False) != open_clip.get_model_config(clip).get("quick_gelu", False):
        other = clip.removesuffix("-quickgelu") if clip.endswith("-quickgelu") else f"{clip}-quickgelu"
        raise CheckpointError(
            f"The weights {pretrained!r} were trained with another activation than that of {clip}: ask for {other!r}."
        )
    repository, _, filename = tag.get("hf_hub", "").rpartition("/")
    for name in [filename] if filename else WEIGHT_FILES:
        cached = try_to_load_from_cache(repository, name) if repository else None
        if isinstance(cached, str):
            return Path(cached), tag
    old_cache = Path.home() / ".cache" / "clip" / tag.get("url", "").rpartition("/")[2]
    return (old_cache if old_cache.is_file() else None), tag


def _weight_file(folder: Path) -> Path:
    """The one file of weights in a folder."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt", ".pth", ".bin"))
    if len(found) == 1:
        return found[0]
    raise WeightsNotFoundError(
        f"{folder} holds {'several files' if found else 'no file'} of weights; give the path of one (.safetensors, .pt)."
    )


def _load_file(model: nn.Module, path: Path) -> None:
    """Load a file of weights in any published format, including OpenAI's TorchScript archives."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch and open_clip warn about TorchScript
            try:
                state = open_clip.factory.load_state_dict(str(path))
            except RuntimeError:  # the TorchScript archives of OpenAI have no plain tensors
                state = torch.jit.load(str(path), map_location="cpu").state_dict()
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as CLIP weights ({error}).") from error
    for name in ("input_resolution", "context_length", "vocab_size"):  # OpenAI stores these numbers with the weights
        state.pop(name, None)
    _load_state(model, {name: tensor.float() for name, tensor in state.items()}, source=path)


def _load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"The weights in {source} do not fit the architecture: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error


def _check_supported(model: nn.Module) -> None:
    """Prompts at every layer need plain blocks, a class token and a causal text tower."""
    visual = getattr(model, "visual", None)
    text = model if isinstance(model, CLIP) else getattr(model, "text", None)
    plain_vision = isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"
    plain_text = isinstance(text, (CLIP, TextTransformer)) and getattr(text, "cls_emb", None) is None
    if not plain_vision or visual.proj is None:
        raise LdvcError(
            "The image tower of this CLIP is not a ViT with a class token; use one such as 'ViT-B-16-quickgelu'."
        )
    if not plain_text or text.attn_mask is None:
        raise LdvcError(
            "The text tower of this CLIP is not a causal transformer; use one such as 'ViT-B-16-quickgelu'."
        )
    blocks = [*visual.transformer.resblocks, *text.transformer.resblocks]
    if not all(isinstance(block, ResidualAttentionBlock) for block in blocks):
        raise LdvcError("This CLIP has other transformer blocks; use one such as 'ViT-B-16-quickgelu'.")
