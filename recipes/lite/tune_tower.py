"""Step 6c of lite: fine-tune the image tower and the three decoders together on masks.

    python -m recipes.lite.tune_tower --data runs/lite_recipe/data --decoders runs/lite_recipe/release \\
        --output runs/lite_recipe/tuned

The late stages of the EfficientNet, the map into the ViT and the ViT learn from the sum of the three decoders' losses.
Against forgetting, each decoder distils random concepts from the tower before tuning, and plain similarity of the tower
is distilled for the names of the step. Some views are mixed from several (`recipes/lite/mixing.py`).

The command uses a GPU if there is one. The output folder contains `clip` (the tensors that differ from the bundled tower), a
checkpoint for each decoder, and `state.pt`, from which the same command resumes.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import DECODERS
from ldvc.errors import LdvcError
from ldvc.modeling.clip import LITE_FOLDER, FrozenClip, build_clip, save_clip_folder
from ldvc.modeling.conv_patch_embed import ConvPatchEmbed, fold_batch_norms, scale_mean, scales
from ldvc.modeling.model import LDVC, similarity_logits
from ldvc.modeling.towers import ImageTower
from recipes.lite.mixing import mosaics, objects, paste
from train.checkpoints import metadata_of
from train.config import TrainConfig, load_config
from train.data import Vocabulary, open_sets
from train.data.sampling import WordSampler
from train.files import written
from train.losses import distillation_loss
from train.objective import Objective, parameter_groups, set_learning_rate
from train.processes import resolved_precision
from train.progress import require_finite, require_finite_weights
from train.train import build_name_sampler, build_vocabulary, read_distillation_names, training_views

TOWER_RATE = 0.4  # learning rate of the tower relative to that of the decoders
SIMILARITY_WEIGHT = 25.0  # weight of the distillation of plain similarity
MOSAICS, PASTED = 0.15, 0.5  # shares of the views with mosaics and with pasted objects
FIRST = 2  # the first of the EfficientNet's seven stages that learns
READ = (4, 6)  # stages whose outputs `ConvPatchEmbed` concatenates


class Trunk(nn.Module):
    """A copy of a patch embedding's EfficientNet whose late stages learn.

    Batch norms are folded into the convolutions, as `ConvPatchEmbed` does for speed. `write_back` undoes it.
    """

    def __init__(self, patch_embed: ConvPatchEmbed) -> None:
        super().__init__()
        folded = fold_batch_norms(copy.deepcopy(patch_embed.backbone)).requires_grad_(False).eval()
        self.patch_size = patch_embed.patch_size
        self.frozen = nn.Sequential(folded.conv_stem, folded.bn1, *folded.blocks[:FIRST])
        self.stages = folded.blocks[FIRST:].requires_grad_(True)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def early(self, images: Tensor) -> list[list[Tensor]]:
        """Apply the frozen stages at each scale: (B, 3, H, W) -> for each scale, tensors (n, C, h, w) whose n add up to B.

        On a CPU the photos go through one by one, because the activations of one photo fit into the cache of a core.
        """
        photos = 1 if images.device.type == "cpu" else len(images)
        return [[self.frozen(part) for part in scaled.split(photos)] for scaled in scales(images, self.grid(images))]

    def late(self, early: list[list[Tensor]], grid: tuple[int, int]) -> Tensor:
        """Outputs of `early` -> (B, channels, h, w) on `grid` (h, w), as `ConvPatchEmbed.features`."""
        return scale_mean([torch.cat([self._late(part) for part in parts]) for parts in early], grid)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) patches of pictures (B, 3, H, W)."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def _late(self, x: Tensor) -> Tensor:
        outputs = []
        for number, stage in enumerate(self.stages, start=FIRST):
            x = stage(x)
            if number in READ:
                outputs.append(x)
        return torch.cat(outputs, dim=1)

    @torch.no_grad()
    def write_back(self, patch_embed: ConvPatchEmbed) -> None:
        """Copy the learned stages into a patch embedding of the same architecture, with batch norms unfolded."""
        for folded, plain in zip(self.stages, patch_embed.backbone.blocks[FIRST:], strict=True):
            unfold_batch_norms(folded, plain)
        patch_embed.load_state_dict(patch_embed.state_dict())  # so that it drops its folded copies


def unfold_batch_norms(folded: nn.Module, plain: nn.Module) -> None:
    """Inverse of `fold_batch_norms`, in place.

    With s = gamma / sqrt(variance + eps), a folded convolution has W' = s W and b' = beta - s mean. Gamma and the statistics
    stay, so W = W' / s and beta = b' + s mean: convolutions and biases of the norms of `plain` are overwritten.
    """
    children, folded_children = list(plain.named_children()), dict(folded.named_children())
    for (name, convolution), (_, norm) in zip(children[:-1], children[1:], strict=True):
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            convolution.weight.copy_(folded_children[name].weight / scale[:, None, None, None])
            norm.bias.copy_(folded_children[name].bias + scale * norm.running_mean)
    for name, child in children:
        if not isinstance(child, (nn.Conv2d, BatchNormAct2d)):
            unfold_batch_norms(folded_children[name], child)


class Tuning(nn.Module):
    """Tower and decoders, all on `clip`, and the loss of a step. `save` writes the learned stages back into `clip`."""

    def __init__(
        self, clip: FrozenClip, decoders: dict[str, LDVC], vocabulary: Vocabulary, concepts: list[str], config: TrainConfig
    ) -> None:
        super().__init__()
        self.clip, self.reference = clip, build_clip("lite")
        self.trunk, self.reference_trunk = Trunk(clip.visual.conv1), Trunk(self.reference.visual.conv1)
        self.reference_trunk.requires_grad_(False)
        self.reference_tower = ImageTower(self.reference, prompts=0)
        self.decoders = nn.ModuleDict(decoders)
        objectives = {name: Objective(decoder, vocabulary, concepts, config) for name, decoder in decoders.items()}
        self.objectives = nn.ModuleDict(objectives)
        clip.visual.requires_grad_(True)
        for frozen in (clip.visual.conv1.backbone, clip.visual.conv1.scale):
            frozen.requires_grad_(False)

    def tower_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the trunk, of the map into the ViT and of the ViT."""
        return [p for part in (self.trunk, self.clip.visual) for p in part.parameters() if p.requires_grad]

    def forward(self, batch: dict[str, Tensor], names: Tensor, concepts: Tensor, words: Tensor) -> dict[str, Tensor]:
        """The loss and its detached parts. Arguments as those of `Objective`, with `images` in the batch."""
        early, grid = self.trunk.early(batch["images"]), self.trunk.grid(batch["images"])
        conv = self.clip.visual.conv1
        patch_tokens = conv.project(conv.scale(self.trunk.late(early, grid)))
        with torch.no_grad():
            conv = self.reference.visual.conv1
            reference_tokens = conv.project(conv.scale(self.reference_trunk.late(early, grid)))
            reference = self.reference_tower(patch_tokens=reference_tokens).patch_features  # (B, N, d)
        views = {"patch_tokens": patch_tokens, "features": reference, "labels": batch["labels"], "set": batch["set"]}
        parts = {}
        for name, objective in self.objectives.items():
            losses = objective(views, names, concepts, words)
            parts |= {f"{name}: {part}": value for part, value in losses.items()}
        chosen = torch.cat([words, concepts + objective.word_count])  # the same for each objective
        parts["similarity"] = self._similarity_loss(patch_tokens, reference, objective, chosen)
        loss = sum(parts[f"{name}: loss"] for name in self.objectives) + parts["similarity"]
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def _similarity_loss(self, patch_tokens: Tensor, reference: Tensor, objective: Objective, chosen: Tensor) -> Tensor:
        """Distillation of plain similarity: nats per patch and name, times the weight."""
        features = objective.model.image_tower(patch_tokens=patch_tokens, prompted=False)
        embeddings = objective.frozen_embeddings[chosen]  # (C + K, d)
        options = {"scale": self.clip.scale, "bias": self.clip.bias}
        logits = (similarity_logits(patches, embeddings, **options) for patches in (features.patch_features, reference))
        new, old = (each.unflatten(-1, features.grid) for each in logits)
        weight = new.new_full(new.shape[:2], SIMILARITY_WEIGHT / (new.shape[0] * new.shape[1]))
        return distillation_loss(new, old, weight)


def start_decoders(
    source: str, clip: FrozenClip, vocabulary: Vocabulary, config: TrainConfig
) -> tuple[dict[str, LDVC], dict[str, dict[str, Any]]]:
    """Every decoder of a folder of checkpoints on `clip`, and their metadata with the names of this run added."""
    decoders, metadata, new = {}, {}, metadata_of(vocabulary, config)
    for decoder in DECODERS:
        decoders[decoder], old = load_checkpoint(source, decoder=decoder, clip=clip)
        seen = list(dict.fromkeys([*old["seen_names"], *new["seen_names"]]))
        words = {**old.get("seen_words", {}), **new["seen_words"]}
        metadata[decoder] = {**old, "seen_names": seen, "seen_words": words, "inference": new["inference"]}
    return decoders, metadata


def save(tuning: Tuning, metadata: dict[str, dict], folder: Path) -> None:
    """Write the tower (the tensors that differ from the bundled one) and a checkpoint for each decoder."""
    tuning.trunk.write_back(tuning.clip.visual.conv1)
    base = os.path.relpath(LITE_FOLDER / "clip", folder / "clip")
    save_clip_folder(tuning.clip.model, folder / "clip", {"base": base})
    for name, decoder in tuning.decoders.items():
        save_checkpoint(decoder, folder / name, metadata=metadata[name], clip="../clip")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="lite_tune", help="default: lite_tune; on a GPU lite_tune_gpu")
    parser.add_argument("--data", help="folder that holds the data sets; default: the configuration's")
    parser.add_argument("--decoders", default="assets/lite", help="folder with a checkpoint for each decoder to start from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.set, data=options.data)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    datasets = open_sets(config.data, list(config.sets), "train", every=config.photos_every)
    vocabulary = build_vocabulary(config, datasets)
    pasteable = vocabulary.annotated & objects(datasets, vocabulary)  # (sets, names)
    concepts = read_distillation_names(config, vocabulary)
    clip = build_clip("lite")
    decoders, metadata = start_decoders(options.decoders, clip, vocabulary, config)
    # before `Tuning`, which makes the tower trainable: the decoders share its parameters
    groups = [group for decoder in decoders.values() for group in parameter_groups(decoder, config)]
    decoder_parameters = [p for group in groups for p in group["params"]]
    tuning = Tuning(clip, decoders, vocabulary, concepts, config).to(device)
    tower_parameters = tuning.tower_parameters()
    # weight decay would pull the pretrained tower towards zero
    groups.append({"params": tower_parameters, "peak": TOWER_RATE * config.learning_rate, "weight_decay": 0.0})
    parameters = decoder_parameters + tower_parameters
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    first, file = 0, options.output / "state.pt"
    if file.is_file():
        state = torch.load(file, map_location="cpu", weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
        print(f"resumed at step {first}", flush=True)

    steps, size = config.max_train_steps, config.train_batch_size
    views = training_views(config, datasets, vocabulary, clip, size)
    rest = Subset(views, range(first * size, len(views)))
    loader = DataLoader(rest, batch_size=size, num_workers=config.num_workers, pin_memory=device.type == "cuda")
    sampler = build_name_sampler(config, vocabulary, concepts)
    word_sampler = WordSampler(vocabulary.other_words, seed=config.seed)
    half = resolved_precision(config.mixed_precision, on_cpu=device.type == "cpu") == "bf16"
    tuning.decoders.train()
    started = time.monotonic()
    for step, batch in enumerate(loader, start=first):
        torch.manual_seed(config.seed * 1_000_003 + step)  # so that dropout and mixing are the same after a resume
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        batch = mosaics(paste(batch, PASTED, pasteable), MOSAICS)
        names, concept_ids = sampler.sample(step, vocabulary.present(batch["labels"]).cpu())
        words = word_sampler.sample(step, names)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            losses = tuning(batch, *(chosen.to(device) for chosen in (names, concept_ids, words)))
        losses["loss"].backward()
        for part in (decoder_parameters, tower_parameters) if config.clip_gradient else ():
            nn.utils.clip_grad_norm_(part, config.clip_gradient)
        set_learning_rate(optimizer, step, config)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % config.log_steps == 0:
            require_finite(float(losses["loss"].detach()), done)
            pace = (time.monotonic() - started) / (done - first)
            values = ", ".join(f"{name} {float(value.detach()):.3f}" for name, value in losses.items())
            print(f"step {done}/{steps} {values}, {pace:.2f} s/step", flush=True)
        if done == steps or (config.checkpointing_steps and done % config.checkpointing_steps == 0):
            require_finite_weights(parameters, done)
            state = {"step": done, "optimizer": optimizer.state_dict(), "parameters": [p.detach() for p in parameters]}
            with written(file) as temporary:
                torch.save(state, temporary)
            save(tuning, metadata, options.output)
    print(f"finished: {options.output} contains the tower and a checkpoint for each decoder")


if __name__ == "__main__":
    try:
        main()
    except LdvcError as error:
        sys.exit(f"error: {error}")
