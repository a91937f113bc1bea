"""Step 6c of lite: the image tower's late stages learn from masks, together with the three decoders on top of them.

    python -m train.lite.tune_tower --data runs/lite_recipe/data --decoders runs/lite_recipe/release \\
        --output runs/lite_recipe/tuned

Until here the tower sees what ImageNet's labels asked for: what a photo shows, hardly where. Now the last three of the
EfficientNet's seven stages (see `train/lite/trunk.py`), the map into the ViT and the ViT learn from the sum of the three
arms' losses, so that no arm has a tower of its own. What the tower knew of other names is kept twice: each arm preserves random
concepts as in its own training, with the tower as it was for reference, and plain similarity of the tower itself is held to
what it was for the names of the step.

The output folder holds `clip` (what differs from the bundled tower) and a checkpoint for each arm; with `state.pt` the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ldvc.checkpoint import load_checkpoint, save_checkpoint
from ldvc.config import ARMS
from ldvc.data import Vocabulary, open_sets
from ldvc.data.sampling import DrawSchedule, NameSampler, TrainingViews, WordSampler
from ldvc.losses import preservation_loss
from ldvc.modeling.clip import LITE_FOLDER, FrozenClip, build_clip, save_clip_folder
from ldvc.modeling.model import LDVC, similarity_logits
from ldvc.modeling.towers import ImageTower
from train.lite.trunk import Trunk
from train.objective import Objective, parameter_groups, set_learning_rate, usable_concepts
from train.options import TrainConfig, load_config
from train.processes import resolved_precision
from train.train import read_concepts
from train.words import read_other_words

logger = logging.getLogger("tune_tower")
TOWER_RATE = 0.375  # the tower's learning rate over that of the decoders
KEEP_WEIGHT = 25.0  # of plain similarity, which shall stay what it was


class Tuning(nn.Module):
    """Tower and arms, and the loss of a step.

    Args:
        clip: the tower to tune. Its ViT starts to learn; the backbone of its stem is only changed by `save`.
        reference: the tower as it was.
        arms: by name, all on `clip`.
        vocabulary, concepts, config: see `Objective`.
    """

    def __init__(
        self,
        clip: FrozenClip,
        reference: FrozenClip,
        arms: dict[str, LDVC],
        vocabulary: Vocabulary,
        concepts: list[str],
        config: TrainConfig,
    ) -> None:
        super().__init__()
        self.clip, self.reference = clip, reference
        self.trunk, self.old_trunk = Trunk(clip.visual.conv1), Trunk(reference.visual.conv1)
        self.old_trunk.requires_grad_(False)
        self.arms = nn.ModuleDict(arms)
        self.objectives = {name: Objective(arm, vocabulary, concepts, config) for name, arm in arms.items()}
        self.old_tower = ImageTower(reference, prompts=0)
        clip.visual.requires_grad_(True)
        for fixed in (clip.visual.conv1.backbone, clip.visual.conv1.scale):
            fixed.requires_grad_(False)

    def tower_parameters(self) -> list[nn.Parameter]:
        """Of the trunk's late stages and of the ViT with the map into it."""
        return [p for part in (self.trunk, self.clip.visual) for p in part.parameters() if p.requires_grad]

    def forward(self, batch: dict[str, Tensor], names: Tensor, concepts: Tensor, words: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; arguments as those of `Objective`, with `images` in the batch."""
        seen = self.trunk.early(batch["images"])
        conv = self.clip.visual.conv1
        stem = conv.project(conv.scale(self.trunk.late(seen)))
        with torch.no_grad():
            conv = self.reference.visual.conv1
            old_stem = conv.project(conv.scale(self.old_trunk.late(seen)))
            old_features = self.old_tower(stem=old_stem).patch_features  # (B, N, d)
        views = {"stem": stem, "features": old_features, "labels": batch["labels"], "set": batch["set"]}
        parts = {}
        for name, objective in self.objectives.items():
            found = objective(views, names, concepts, words)
            parts |= {f"{name}: {part}": value for part, value in found.items()}
        parts["keep"] = self._keep(stem, old_features, torch.cat([words, concepts + objective.word_count]), objective)
        loss = parts["keep"] + sum(parts[f"{name}: loss"] for name in self.objectives)
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def _keep(self, stem: Tensor, old_features: Tensor, chosen: Tensor, objective: Objective) -> Tensor:
        """How far plain similarity has drifted, in nats per patch and name, times its weight."""
        tower = objective.model.image_tower
        features = tower(stem=stem, prompted=False)
        embeddings = objective.frozen_embeddings[chosen]  # (C + K, d)
        scale, bias = self.clip.scale, self.clip.bias
        new, old = (
            similarity_logits(patches, embeddings, scale=scale, bias=bias).unflatten(-1, features.grid)
            for patches in (features.patch_features, old_features)
        )
        weight = new.new_full(new.shape[:2], KEEP_WEIGHT / (new.shape[0] * new.shape[1]))
        return preservation_loss(new, old, weight)


def save(tuning: Tuning, metadata: dict[str, dict], folder: Path) -> None:
    """Write the tower (what differs from the bundled one) and a checkpoint for each arm."""
    tuning.trunk.write_back(tuning.clip.visual.conv1)
    base = os.path.relpath(LITE_FOLDER / "clip", folder / "clip")
    save_clip_folder(tuning.clip.model, folder / "clip", {"base": base})
    for name, arm in tuning.arms.items():
        save_checkpoint(arm, folder / name, metadata=metadata[name], clip="../clip")


def main(arguments: list[str] | None = None, *, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
    """The command. `on_step` is called after each step with its number, from 1, and the parts of its loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="lite_tune")
    parser.add_argument("--data", default=None, help="folder that holds the data sets; default: the configuration's")
    parser.add_argument(
        "--decoders", default="assets/lite", help="folder with a checkpoint for each arm: where they start"
    )
    parser.add_argument("--clip", default="lite", help="the tower to start from")
    parser.add_argument("--output", type=Path, default=Path("runs/lite_tune"))
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(options.config, options.set, data=options.data)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)

    datasets = open_sets(config.data, list(config.sets), "train", every=config.photos_every, layouts=config.layouts)
    vocabulary = Vocabulary(datasets, config.held_out(), other_words=read_other_words(config.other_words))
    concepts = usable_concepts(read_concepts(config.concepts), vocabulary, config.held_out())
    clip, arms, metadata = build_clip(options.clip), {}, {}
    for arm in ARMS:
        arms[arm], metadata[arm] = load_checkpoint(options.decoders, arm=arm, clip=clip)
    groups = [group for arm in arms.values() for group in parameter_groups(arm, config)]  # while the tower is frozen
    of_arms = [p for group in groups for p in group["params"]]
    tuning = Tuning(clip, build_clip("lite"), arms, vocabulary, concepts, config)
    of_tower = tuning.tower_parameters()
    # no decay: the tower shall stay near what it was, not near zero
    groups.append({"params": of_tower, "peak": TOWER_RATE * config.learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    parameters = of_arms + of_tower
    first, state_file = 0, options.output / "state.pt"
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        logger.info("resumed at step %d", first)

    steps, batch_size = config.max_train_steps, config.train_batch_size
    views = TrainingViews(
        datasets,
        vocabulary,
        DrawSchedule([len(dataset) for dataset in datasets], list(config.sets.values()), config.seed),
        draws=steps * batch_size,
        augmentation=config.augmentation(),
        mean=clip.mean,
        std=clip.std,
        seed=config.seed,
    )
    loader = DataLoader(Subset(views, range(first * batch_size, len(views))), batch_size=batch_size)
    preserve, full = config.preserve_names, config.full_vocabulary
    sampler = NameSampler(len(vocabulary), len(concepts), preserve=preserve, full_probability=full, seed=config.seed)
    reader = WordSampler(vocabulary.other_words, share=config.other_words_share, seed=config.seed)
    half = resolved_precision(config.mixed_precision, on_cpu=True) == "bf16"
    tuning.arms.train()
    started, sums = time.monotonic(), {}
    for step, batch in enumerate(loader, start=first):
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, also after a resume
        names, concept_ids = sampler.sample(step, vocabulary.present(batch["labels"]))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses = tuning(batch, names, concept_ids, reader.sample(step, names))
        losses["loss"].backward()
        for part in (of_arms, of_tower):
            nn.utils.clip_grad_norm_(part, config.clip_gradient)
        set_learning_rate(optimizer, step, config)
        optimizer.step()
        optimizer.zero_grad()
        shown = {name: float(value.detach()) for name, value in losses.items()}
        for name, value in shown.items():
            sums[name] = sums.get(name, 0.0) + value / config.log_steps
        if (step + 1) % config.log_steps == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            means = ", ".join(f"{name} {value:.3f}" for name, value in sums.items())
            logger.info("step %d/%d %s, %.2f s/step", step + 1, steps, means, pace)
            sums = {}
        if step + 1 == steps or (config.checkpointing_steps and (step + 1) % config.checkpointing_steps == 0):
            state = {
                "step": step + 1,
                "optimizer": optimizer.state_dict(),
                "parameters": [p.detach() for p in parameters],
            }
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            save(tuning, metadata, options.output)
        if on_step is not None:
            on_step(step + 1, shown)
    logger.info("finished: %s holds the tower and a checkpoint for each arm", options.output)


if __name__ == "__main__":
    main()
