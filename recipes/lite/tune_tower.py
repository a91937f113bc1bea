"""Step 6c of lite: the image tower's late stages learn from masks, together with the three decoders on top of them.

    python -m recipes.lite.tune_tower --data runs/lite_recipe/data --decoders runs/lite_recipe/release \\
        --output runs/lite_recipe/tuned

Until here the tower sees what ImageNet's labels asked for: what a photo shows, hardly where. Now stages of the EfficientNet
(see `recipes/lite/trunk.py`), the map into the ViT and the ViT learn from the sum of the three decoders' losses, so that no
decoder has a tower of its own. What the tower knew of other names is kept twice: each decoder preserves random concepts as in
its own training, with the tower as it was for reference, and plain similarity of the tower itself is held to what it was for
the names of the step. Some views may be mosaics of four or have things of others pasted into them, see
`recipes/lite/mixing.py`.

It runs on a GPU if there is one. The output folder holds `clip` (what differs from the bundled tower) and a checkpoint for each
decoder; with `state.pt` the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import DECODERS
from ldvc.errors import LdvcError
from ldvc.modeling.clip import LITE_FOLDER, FrozenClip, build_clip, save_clip_folder
from ldvc.modeling.model import LDVC, similarity_logits
from ldvc.modeling.towers import ImageTower
from recipes.lite.mixing import mosaics, paste, things
from recipes.lite.trunk import FIRST, Trunk
from train.checkpoints import metadata_of
from train.data import SegmentationDataset, Vocabulary, open_sets
from train.data.sampling import DrawSchedule, NameSampler, TrainingViews, WordSampler
from train.losses import preservation_loss
from train.objective import Objective, parameter_groups, set_learning_rate, usable_concepts
from train.options import ConfigError, TrainConfig, load_config
from train.processes import resolved_precision
from train.progress import require_finite, require_finite_weights
from train.train import read_concepts
from train.words import read_other_words

logger = logging.getLogger("tune_tower")
# What may change when a run goes on: where things lie, and what is told and kept on the way.
NO_PART_OF_A_RUN = {"config", "set", "output", "output_dir", "data", "cache_dir", "num_workers", "log_steps"}
NO_PART_OF_A_RUN |= {"checkpointing_steps"}


class Tuning(nn.Module):
    """Tower and decoders, and the loss of a step.

    Args:
        clip: the tower to tune. Its ViT starts to learn; the backbone of its patch embedding is only changed by `save`.
        reference: the tower as it was.
        decoders: by name, all on `clip`.
        vocabulary, concepts, config: see `Objective`.
        first, depthwise: what of the backbone learns, see `Trunk`.
        keep_weight: of plain similarity, which shall stay what it was; 0 saves the time that it takes.
    """

    def __init__(
        self,
        clip: FrozenClip,
        reference: FrozenClip,
        decoders: dict[str, LDVC],
        vocabulary: Vocabulary,
        concepts: list[str],
        config: TrainConfig,
        *,
        first: int = FIRST,
        depthwise: bool = False,
        keep_weight: float = 25.0,
    ) -> None:
        super().__init__()
        self.clip, self.reference, self.keep_weight = clip, reference, keep_weight
        self.trunk = Trunk(clip.visual.conv1, first=first, depthwise=depthwise)
        self.old_trunk = Trunk(reference.visual.conv1, first=first)
        self.old_trunk.requires_grad_(False)
        self.decoders = nn.ModuleDict(decoders)
        self.objectives = {name: Objective(decoder, vocabulary, concepts, config) for name, decoder in decoders.items()}
        self.old_tower = ImageTower(reference, prompts=0)
        clip.visual.requires_grad_(True)
        for fixed in (clip.visual.conv1.backbone, clip.visual.conv1.scale):
            fixed.requires_grad_(False)

    def tower_parameters(self) -> list[nn.Parameter]:
        """Of the trunk's stages that learn and of the ViT with the map into it."""
        return [p for part in (self.trunk, self.clip.visual) for p in part.parameters() if p.requires_grad]

    def forward(
        self,
        batch: dict[str, Tensor],
        names: Tensor,
        concepts: Tensor,
        words: Tensor,
        *,
        decoders: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its parts; arguments as those of `Objective`, with `images` in the batch.

        Args:
            decoders: those that learn in this step; None = all.
        """
        seen, size = self.trunk.early(batch["images"]), batch["images"].shape[-2:]
        conv = self.clip.visual.conv1
        patch_tokens = conv.project(conv.scale(self.trunk.late(seen, size)))
        with torch.no_grad():
            conv = self.reference.visual.conv1
            old_tokens = conv.project(conv.scale(self.old_trunk.late(seen, size)))
            old_features = self.old_tower(patch_tokens=old_tokens).patch_features  # (B, N, d)
        views = {"patch_tokens": patch_tokens, "features": old_features, "labels": batch["labels"], "set": batch["set"]}
        parts = {}
        decoders = list(self.objectives) if decoders is None else decoders
        for name in decoders:
            found = self.objectives[name](views, names, concepts, words)
            parts |= {f"{name}: {part}": value for part, value in found.items()}
        loss = sum(parts[f"{name}: loss"] for name in decoders)
        if self.keep_weight:
            objective = self.objectives[decoders[0]]
            chosen = torch.cat([words, concepts + objective.word_count])
            parts["keep"] = self._keep(patch_tokens, old_features, chosen, objective)
            loss = loss + parts["keep"]
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def _keep(self, patch_tokens: Tensor, old_features: Tensor, chosen: Tensor, objective: Objective) -> Tensor:
        """How far plain similarity has drifted, in nats per patch and name, times its weight."""
        tower = objective.model.image_tower
        features = tower(patch_tokens=patch_tokens, prompted=False)
        embeddings = objective.frozen_embeddings[chosen]  # (C + K, d)
        scale, bias = self.clip.scale, self.clip.bias
        new, old = (
            similarity_logits(patches, embeddings, scale=scale, bias=bias).unflatten(-1, features.grid)
            for patches in (features.patch_features, old_features)
        )
        weight = new.new_full(new.shape[:2], self.keep_weight / (new.shape[0] * new.shape[1]))
        return preservation_loss(new, old, weight)


def start_decoders(
    source: str, clip: FrozenClip, vocabulary: Vocabulary, config: TrainConfig
) -> tuple[dict[str, LDVC], dict[str, dict[str, Any]]]:
    """Every decoder on `clip`, from a folder of checkpoints or, if that is "fresh", as each begins; and their metadata."""
    decoders, metadata, now = {}, {}, metadata_of(vocabulary, config)
    for decoder in DECODERS:
        if source == "fresh":
            decoders[decoder], metadata[decoder] = LDVC(replace(config.model_config(), decoder=decoder), clip), now
        else:
            decoders[decoder], before = load_checkpoint(source, decoder=decoder, clip=clip)
            seen = list(dict.fromkeys([*before["seen_names"], *now["seen_names"]]))
            words = {**before.get("seen_words", {}), **now["seen_words"]}
            metadata[decoder] = {**before, "seen_names": seen, "seen_words": words, "inference": now["inference"]}
        decoders[decoder].to(clip.model.logit_scale.device)
    return decoders, metadata


def save(tuning: Tuning, metadata: dict[str, dict], folder: Path) -> None:
    """Write the tower (what differs from the bundled one) and a checkpoint for each decoder."""
    tuning.trunk.write_back(tuning.clip.visual.conv1)
    base = os.path.relpath(LITE_FOLDER / "clip", folder / "clip")
    save_clip_folder(tuning.clip.model, folder / "clip", {"base": base})
    for name, decoder in tuning.decoders.items():
        save_checkpoint(decoder, folder / name, metadata=metadata[name], clip="../clip")


class State:
    """Step, parameters and optimiser of a run, and on what it depends, in a file that is replaced as a whole."""

    def __init__(
        self, file: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, settings: dict[str, Any]
    ) -> None:
        self.file, self.parameters, self.optimizer = file, parameters, optimizer
        self.settings = {name: repr(value) for name, value in settings.items()}

    def load(self) -> int:
        """The number of steps done; 0 without a file.

        Raises:
            ConfigError: what is there is another run's.
        """
        if not self.file.is_file():
            return 0
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        others = [name for name, value in self.settings.items() if state.get("settings", {}).get(name) != value]
        if others:
            raise ConfigError(
                f"{self.file} is the state of a run with other settings ({', '.join(others)}); give its settings to go on with "
                "it, or another --output."
            )
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        logger.info("resumed at step %d", state["step"])
        return state["step"]

    def save(self, step: int) -> None:
        values = [p.detach() for p in self.parameters]
        new = self.file.with_suffix(".new")
        content = {"step": step, "optimizer": self.optimizer.state_dict(), "parameters": values, "settings": self.settings}
        torch.save(content, new)
        new.replace(self.file)


def batches(
    config: TrainConfig,
    datasets: Sequence[SegmentationDataset],
    vocabulary: Vocabulary,
    clip: FrozenClip,
    *,
    first: int,
    pinned: bool,
) -> DataLoader:
    """The views of a run from step `first` on, made afresh, for they go through stages that learn."""
    size = config.train_batch_size
    views = TrainingViews(
        datasets,
        vocabulary,
        DrawSchedule([len(dataset) for dataset in datasets], list(config.sets.values()), config.seed),
        draws=config.max_train_steps * size,
        augmentation=config.augmentation(),
        mean=clip.mean,
        std=clip.std,
        seed=config.seed,
    )
    rest = Subset(views, range(first * size, len(views)))
    return DataLoader(rest, batch_size=size, num_workers=config.num_workers, pin_memory=pinned)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="lite_tune")
    parser.add_argument("--data", default=None, help="folder that holds the data sets; default: the configuration's")
    parser.add_argument(
        "--decoders", default="assets/lite", help="folder with a checkpoint for each decoder: where they start; or 'fresh'"
    )
    parser.add_argument("--clip", default="lite", help="the tower to start from")
    parser.add_argument("--output", type=Path, help="default: the configuration's output_dir")
    parser.add_argument("--first_stage", type=int, default=FIRST, help=f"the first that learns, 0 to 4; default: {FIRST}")
    parser.add_argument("--depthwise", action="store_true", help="depthwise kernels learn, too: slow on a CPU")
    parser.add_argument("--tower_rate", type=float, default=0.375, help="learning rate over the decoders'; 0.375")
    parser.add_argument("--keep_weight", type=float, default=25.0, help="of plain similarity as it was; 25; 0 saves time")
    parser.add_argument("--in_turn", action="store_true", help="each step teaches one decoder: a third of the time of three")
    parser.add_argument("--mosaics", type=float, default=0.0, help="share of views that are mosaics of four; 0")
    parser.add_argument("--paste", type=float, default=0.0, help="share of views with things of others pasted in; 0")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, *, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
    """The command. `on_step` is called after each step with its number, from 1, and the parts of its loss."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(options.config, options.set, data=options.data)
    output = options.output or Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    datasets = open_sets(config.data, list(config.sets), "train", every=config.photos_every, layouts=config.layouts)
    vocabulary = Vocabulary(
        datasets,
        config.held_out(),
        hidden_as_background=config.held_out_as_negative,
        other_words=read_other_words(config.other_words) if config.other_words else None,
    )
    pasted = vocabulary.known & things(datasets, vocabulary)  # (sets, names)
    concepts = usable_concepts(read_concepts(config.concepts), vocabulary, config.held_out())
    clip = build_clip(options.clip).to(device)
    decoders, metadata = start_decoders(options.decoders, clip, vocabulary, config)
    # while the tower is frozen
    groups = [group for decoder in decoders.values() for group in parameter_groups(decoder, config)]
    of_decoders = [p for group in groups for p in group["params"]]
    tuning = Tuning(
        clip,
        build_clip("lite").to(device),
        decoders,
        vocabulary,
        concepts,
        config,
        first=options.first_stage,
        depthwise=options.depthwise,
        keep_weight=options.keep_weight,
    )
    of_tower = tuning.tower_parameters()
    # no decay: the tower shall stay near what it was, not near zero
    groups.append({"params": of_tower, "peak": options.tower_rate * config.learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    settings = {name: value for name, value in (config.to_dict() | vars(options)).items() if name not in NO_PART_OF_A_RUN}
    state = State(output / "state.pt", of_decoders + of_tower, optimizer, settings)
    first, steps = state.load(), config.max_train_steps
    loader = batches(config, datasets, vocabulary, clip, first=first, pinned=device.type == "cuda")
    preserve, full = config.preserve_names, config.full_vocabulary
    sampler = NameSampler(
        len(vocabulary),
        len(concepts),
        preserve=preserve,
        full_probability=full,
        limit=config.names_per_step,
        seed=config.seed,
    )
    reader = WordSampler(vocabulary.other_words, share=config.other_words_share, seed=config.seed)
    half = resolved_precision(config.mixed_precision, on_cpu=device.type == "cpu") == "bf16"
    tuning.decoders.train()
    started, sums = time.monotonic(), {}
    for step, batch in enumerate(loader, start=first):
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, mosaics and what is pasted, also after a resume
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if options.paste:
            batch = paste(batch, options.paste, pasted, torch.default_generator)
        if options.mosaics:
            batch = mosaics(batch, options.mosaics, torch.default_generator)
        names, concept_ids = sampler.sample(step, vocabulary.present(batch["labels"]).cpu())
        words = reader.sample(step, names)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            learning = [DECODERS[step % len(DECODERS)]] if options.in_turn else None
            losses = tuning(batch, *(chosen.to(device) for chosen in (names, concept_ids, words)), decoders=learning)
        losses["loss"].backward()
        for part in (of_decoders, of_tower) if config.clip_gradient else ():
            nn.utils.clip_grad_norm_(part, config.clip_gradient)
        set_learning_rate(optimizer, step, config)
        optimizer.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step + 1, {name: float(value.detach()) for name, value in losses.items()})
        for name, value in losses.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + value.detach(), count + 1
        if (step + 1) % config.log_steps == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            require_finite(float(sums["loss"][0]), step + 1)
            means = ", ".join(f"{name} {float(total) / count:.3f}" for name, (total, count) in sums.items())
            logger.info("step %d/%d %s, %.2f s/step", step + 1, steps, means, pace)
            sums = {}
        if step + 1 == steps or (config.checkpointing_steps and (step + 1) % config.checkpointing_steps == 0):
            require_finite(float(losses["loss"].detach()), step + 1)
            require_finite_weights(of_decoders + of_tower, step + 1)
            state.save(step + 1)
            save(tuning, metadata, output)
    logger.info("finished: %s holds the tower and a checkpoint for each decoder", output)


if __name__ == "__main__":
    try:
        main()
    except LdvcError as error:
        sys.exit(f"error: {error}")
