"""Validation during training. It does not change the run: random numbers, modes and data order stay as they were."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ldvc.class_names import SeenNames
from ldvc.modeling.model import LDVC
from ldvc.predictor import Predictor
from train.config import TrainConfig
from train.data import SegmentationDataset, Vocabulary, open_sets
from train.evaluation import Photos, evaluate_set, gather, unlimited
from train.figures import draw_figure, examples, fixed_photos
from train.metrics import harmonic_mean, mean_iou


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Restores every module's mode and all random number generators at the end."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])


class Validation:
    """Evaluates the model of a run on photos with masks, and draws a figure.

    Args:
        config: of the run. vocabulary: the names that it learns.
        accelerator: of the run.

    Raises:
        DataError: a data set is missing.
    """

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        names = config.validation_sets or list(config.sets)
        every = dict.fromkeys(names, config.validation_every)
        self.datasets = open_sets(config.data, names, "val", every=every, layouts=config.layouts)
        self.photos = fixed_photos(self.datasets)
        self._learned = SeenNames(vocabulary.spellings, vocabulary.seen_words)

    def seen(self, name: str) -> bool:
        """Whether the run has masks of a name, by the rule of train/evaluate.py."""
        return name in self._learned

    def __call__(self, model: LDVC, step: int) -> tuple[dict[str, dict[str, float]], np.ndarray | None]:
        """Evaluates; every process must call it.

        Returns:
            set -> measure -> value, and the figure (H, W, 3) uint8, which the main process also writes to figures/step-N.png.
            The numbers are the same in all processes; the figure is None on all but the main one.
        """
        with unchanged(model):
            metadata = {"inference": unlimited(self.config.inference)}
            predictor = Predictor(model, metadata, device=next(model.parameters()).device)
            results = {dataset.name: self._evaluate(predictor, dataset) for dataset in self.datasets}
            figure = None
            if self.accelerator.is_main_process and self.photos:
                figure = self._figure(predictor, step, results)
        self.accelerator.wait_for_everyone()
        return results, figure

    def _evaluate(self, predictor: Predictor, dataset: SegmentationDataset) -> dict[str, float]:
        photos = Photos(
            self.config.cache_dir if self.config.views_per_photo else None,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        share = evaluate_set(predictor, dataset, photos, seen=self.seen, offset=None, joint_only=True)
        joint = gather(share).joint
        flags = [self.seen(name) for name in dataset.names()]
        iou = joint.iou()
        seen, unseen = mean_iou(iou, flags), mean_iou(iou, [not flag for flag in flags])
        return {
            "pAcc": joint.pixel_accuracy(),
            "mIoU": mean_iou(iou),
            "mIoU(S)": seen,
            "mIoU(U)": unseen,
            "hIoU": harmonic_mean(seen, unseen),
        }

    def _figure(self, predictor: Predictor, step: int, results: dict[str, dict[str, float]]) -> np.ndarray:
        rows = examples(predictor, self.datasets, self.photos)
        scores = ", ".join(
            f"{name} mIoU {values['mIoU']:.3f}" for name, values in results.items() if not math.isnan(values["mIoU"])
        )
        figure = draw_figure(rows, seen=self.seen, title=f"step {step}: {scores}")
        path = Path(self.config.output_dir) / "figures" / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(figure).save(path)
        return figure
