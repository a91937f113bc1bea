"""Evaluation while training goes on. It leaves no trace in the run: random numbers, modes and data order stay as they were."""

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
from train.data import SegmentationDataset, Vocabulary, open_sets
from train.evaluation import Photos, evaluate_set, gather, unlimited
from train.figures import draw_sheet, examples, fixed_photos, save_sheet
from train.metrics import harmonic_mean, mean_iou
from train.options import TrainConfig


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Whatever happens in here, every module's mode and all random number generators are as before at the end."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


class Validation:
    """Evaluates the model of a run on photos with masks, and draws the picture sheet.

    Args:
        config: of the run. vocabulary: what it learns.
        accelerator: knows the precision and the main process.

    Raises:
        DataError: a data set is missing.
    """

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        names = config.validation_sets or list(config.sets)
        every = dict.fromkeys(names, config.validation_every)
        self.datasets = open_sets(config.data, names, config.validation_split, every=every, layouts=config.layouts)
        self.photos = fixed_photos(self.datasets, config.sheet_photos)
        self._learned = SeenNames(vocabulary.spellings, vocabulary.seen_words)

    def seen(self, name: str) -> bool:
        """Whether the run has masks of a name, by the rule of train/evaluate.py."""
        return name in self._learned

    def __call__(self, model: LDVC, step: int) -> tuple[dict[str, dict[str, float]], np.ndarray | None]:
        """Evaluates; every process must call it.

        Returns:
            set -> measure -> value, and the sheet (H, W, 3) uint8, which the main process also writes to sheets/step-N.png.
            The numbers are the same in all processes; the sheet is None on all but the main one.
        """
        with unchanged(model):
            metadata = {"inference": unlimited(self.config.inference)}
            predictor = Predictor(model, metadata, device=next(model.parameters()).device)
            results = {dataset.name: self._evaluate(predictor, dataset) for dataset in self.datasets}
            sheet = None
            if self.accelerator.is_main_process:
                sheet = np.asarray(self._sheet(predictor, step, results))
        self.accelerator.wait_for_everyone()
        return results, sheet

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

    def _sheet(self, predictor: Predictor, step: int, results: dict[str, dict[str, float]]) -> Image.Image:
        rows = examples(predictor, self.datasets, self.photos)
        scores = ", ".join(
            f"{name} mIoU {values['mIoU']:.3f}" for name, values in results.items() if not math.isnan(values["mIoU"])
        )
        sheet = draw_sheet(rows, seen=self.seen, title=f"step {step}: {scores}")
        save_sheet(sheet, Path(self.config.output_dir) / "sheets", step)
        return sheet
