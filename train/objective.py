"""The objective of a training step: one module for model and losses, so that accelerate can wrap both together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldvc.class_names import canonical_set
from ldvc.modeling.model import LDVC, similarity_logits
from train.config import TrainConfig
from train.data import BACKGROUND, HELD_OUT, VOID, Vocabulary
from train.losses import ONE_PROCESS, Processes, attention_loss, distillation_loss, mask_loss, pseudo_labels


def usable_distillation_names(names: Sequence[str], vocabulary: Vocabulary, held_out: frozenset[str]) -> list[str]:
    """Names for distillation: neither learned nor held out, under any spelling or other word."""
    excluded = canonical_set([*vocabulary.names, *vocabulary.words]) | held_out
    return [name for name in dict.fromkeys(names) if not canonical_set([name]) & excluded]


class Objective(nn.Module):
    """The model and its losses, with the weights of `config`.

    `distillation_names`: names outside of the vocabulary, for which the similarity of the frozen towers is distilled.
    """

    def __init__(
        self,
        model: LDVC,
        vocabulary: Vocabulary,
        distillation_names: Sequence[str],
        config: TrainConfig,
        *,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        super().__init__()
        self.model, self.config, self.processes = model, config, processes
        self.annotated, self.partially_annotated = vocabulary.annotated, vocabulary.partially_annotated
        self.unseen, self.shared = vocabulary.unseen, vocabulary.shared
        self.word_count = len(vocabulary.words)  # the tokens of distillation names follow
        tokens = model.text_tower.tokenize([*vocabulary.words, *distillation_names])
        self.register_buffer("tokens", tokens, persistent=False)
        with torch.no_grad():
            frozen = torch.cat([model.text_tower(part, prompted=False).float() for part in tokens.split(256)])
        self.register_buffer("frozen_embeddings", frozen, persistent=False)

    def forward(
        self, batch: dict[str, Tensor], names: Tensor, distilled: Tensor, words: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss and its parts.

        Args:
            batch: `images` or `patch_tokens` (and `features`), `labels` (B, H, W), `set` (B,).
            names: (C,) indices of the names to learn in this step; with held-out names, their pixels get pseudo-labels.
            distilled: (K,) indices of the distillation names of this step.
            words: (C,) index in `Vocabulary.words` of the word that stands for each of `names`; None = the names themselves.

        Returns:
            "loss" with gradient; "focal", "dice", "attention", "distill" weighted and detached.
        """
        config = self.config
        patch_tokens = batch.get("patch_tokens")
        if patch_tokens is None:
            patch_tokens = self.model.image_tower.embed_patches(batch["images"])
        tokens = torch.cat([names if words is None else words, distilled + self.word_count])  # (C + K,)
        image = self.model.encode_image(patch_tokens=patch_tokens)
        if self.model.text_tower.prompts is None:
            class_embeddings = self.frozen_embeddings[tokens]  # (C + K, d)
        else:
            class_embeddings = self.model.encode_names(self.tokens[tokens])
        all_logits = self.model.decode(image, class_embeddings).mask_logits  # (B, C + K, h, w)
        mask_logits = all_logits[:, : len(names)]

        labels, annotated = self._targets(batch, names, words, mask_logits)
        options = {"alpha": config.focal_alpha, "gamma": config.focal_gamma, "normalise": config.focal_normalise}
        options |= {"void_is_negative": config.ignore_as_negative, "processes": self.processes}
        masks = mask_loss(mask_logits, labels, annotated, **options)
        parts = {"focal": config.focal_weight * masks.focal, "dice": config.dice_weight * masks.dice}
        if config.attention_weight:
            attention = attention_loss(mask_logits, labels, annotated, processes=self.processes)
            parts["attention"] = config.attention_weight * attention
        if config.distill_unannotated_weight or (config.distill_weight and len(distilled)):
            with torch.no_grad():
                features, clip = batch.get("features"), self.model.clip
                if features is None:
                    features = self.model.image_tower(patch_tokens=patch_tokens, prompted=False).patch_features
                reference = similarity_logits(features, self.frozen_embeddings[tokens], scale=clip.scale, bias=clip.bias)
                reference = rearrange(reference, "b c (h w) -> b c h w", h=all_logits.shape[-2])
            unannotated = (~annotated).float()  # (B, C)
            weights = config.distill_unannotated_weight * unannotated / self.processes.share(unannotated.sum())
            pairs = len(annotated) * len(distilled)
            of_distilled = weights.new_full((len(annotated), len(distilled)), config.distill_weight / max(1, pairs))
            parts["distill"] = distillation_loss(all_logits, reference, torch.cat([weights, of_distilled], dim=1))

        loss = sum(parts.values())
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _targets(self, batch: dict[str, Tensor], names: Tensor, words: Tensor | None, mask_logits: Tensor) -> tuple:
        """Labels (B, H, W) as indices into `names`, and (B, C) bool: whether the mask of a photo is valid for a name."""
        unseen = self.unseen.to(names.device)[names]  # (C,)
        self_training = bool(unseen.any())
        # Vocabulary index -> index into `names`; the last three cells are for VOID (-1), BACKGROUND (-2) and HELD_OUT (-3).
        index_of = torch.full((len(self.unseen) + 3,), BACKGROUND, dtype=torch.int16, device=names.device)
        index_of[names] = torch.arange(len(names), dtype=torch.int16, device=names.device)
        index_of[VOID], index_of[HELD_OUT] = VOID, HELD_OUT if self_training else VOID
        labels = index_of[batch["labels"].int()]
        annotated = self.annotated.to(names.device)[batch["set"]][:, names]  # (B, C)
        if self_training:
            labels = pseudo_labels(mask_logits, labels, annotated & unseen)
        partially = self.partially_annotated.to(names.device)[batch["set"]][:, names]  # (B, C)
        if words is not None:  # "animal" may stand for "dog", and a photo without dogs may show another animal
            partially = partially | self.shared.to(names.device)[words]
        if partially.any():  # a mask is valid for such a name only if it shows the name
            visible = torch.stack([(labels == index).flatten(1).any(dim=1) for index in range(len(names))], dim=1)  # (B, C)
            annotated = annotated & (visible | ~partially)
        return labels, annotated


def parameter_groups(model: LDVC, config: TrainConfig) -> list[dict[str, Any]]:
    """Optimiser groups: prompts and head have separate learning rates, `peak` after warm-up.

    Vectors and scalars (norms, biases, gates) have no weight decay, except in the recipe "published" (D4 of docs/method.md).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prompt = name.startswith(("image_tower", "text_tower"))
            matrix = parameter.ndim > 1 and "gate" not in name.rsplit(".", 1)[-1]
            groups.setdefault((prompt, matrix or model.config.parts.vectors_decay), []).append(parameter)
    peaks = {True: config.learning_rate * config.prompt_multiplier, False: config.learning_rate * config.head_multiplier}
    return [
        {"params": parameters, "peak": peaks[prompt], "weight_decay": config.weight_decay if decays else 0.0}
        for (prompt, decays), parameters in groups.items()
    ]


def learning_rate(peak: float, step: int, config: TrainConfig) -> float:
    """mmsegmentation's polynomial schedule with linear warm-up, as ZegCLIP uses it; a pure function of the step.

        rate = w * (minimum + (peak - minimum) * (1 - step / steps) ^ power),   w from 1e-6 to 1 over the warm-up

    In mmsegmentation and in the recipe "published" (D8 of docs/method.md), the first step has w = 1e-6 and learns nothing;
    otherwise the first step has the w of the second step. If the peak is below the minimum, the rate is w * peak.
    """
    floor = min(config.minimum_learning_rate, peak)
    decay = max(0.0, 1 - step / config.max_train_steps) ** config.power
    position = step + config.model.parts.first_warmup_step
    warm = 1e-6 + (1 - 1e-6) * min(1.0, position / config.warmup_steps) if config.warmup_steps else 1.0
    return warm * (floor + (peak - floor) * decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Sets the rate of every group for a step and returns the highest."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(group["peak"], step, config)
    return max(group["lr"] for group in optimizer.param_groups)
