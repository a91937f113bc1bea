"""Segments the photos of a data set with the predictor of the page, counts correct pixels, and fits calibrations."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ldvc.calibration import Calibration
from ldvc.class_names import ClassName, plain
from ldvc.errors import DataError
from ldvc.inference import ImageState, model_input_size, sliding_windows
from ldvc.predictor import PLAIN_CLIP, Predictor
from ldvc.result import Segmentation
from train import metrics
from train.data import VOID, SegmentationDataset, weights_digest
from train.data.vocabulary import lookup
from train.metrics import BackgroundCurve, ConfusionMatrix, Means, ThresholdCurve

logger = logging.getLogger("evaluate")

OFFSET = 0.1  # gamma of ZegCLIP and later work
ABSENT = 3  # names of a `Question` that the photo does not show
UNLIMITED = 1e9  # factor by which photos may be enlarged


def unlimited(inference: Mapping[str, Any]) -> dict[str, Any]:
    """The inference settings; with `short_side`, small photos are enlarged without a limit, as in the published protocol."""
    return ({"enlarge": UNLIMITED} if "short_side" in inference else {}) | dict(inference)


# ---- photos ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """A photo and its mask."""

    index: int  # position in the data set
    stem: str  # file name
    picture: np.ndarray  # (H, W, 3) uint8
    target: Tensor  # (H, W) int64; index of the name, VOID or BACKGROUND


class PhotoReader(Dataset):
    """The photos of a data set. If a photo cannot be read, its item is an error message."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset, self.table = dataset, lookup(dataset, range(len(dataset.names()))).astype(np.int64)

    def __getitem__(self, index: int) -> Photo | str:
        try:
            image, mask = self.dataset.pair(index)
        except DataError as error:
            return str(error)
        return Photo(index, self.dataset.stems[index], np.asarray(image), torch.from_numpy(self.table[mask]))


@dataclass(frozen=True)
class Photos:
    """How photos are loaded."""

    cache_dir: str | None = None  # for outputs of the patch embedding; saves time if it is a network
    num_workers: int = 0  # processes that load photos

    def of(self, dataset: SegmentationDataset) -> Iterator[Photo | str]:
        """This process's share of the photos of a data set."""
        state = PartialState()
        share = Subset(PhotoReader(dataset), range(state.process_index, len(dataset), state.num_processes))
        return iter(DataLoader(share, batch_size=None, num_workers=self.num_workers))

    def patch_token_folder(self, dataset: SegmentationDataset, predictor: Predictor) -> Path | None:
        """Folder of the patch tokens of these photos at this size and with these weights; None without a cache."""
        if not self.cache_dir:
            return None
        clip = predictor.model.clip
        facts = [dataset.fingerprint(masks=False), sorted(predictor.inference.items()), clip.patch_size]
        statistics = predictor.model.image_tower.statistics(prompted=predictor.decoder != PLAIN_CLIP)
        if statistics != (clip.mean, clip.std):
            facts.append(statistics)
        key = json.dumps([*facts, weights_digest(clip.visual)])
        name = f"patch-tokens-{dataset.file_name}-{dataset.split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        folder = Path(self.cache_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def encode(predictor: Predictor, photo: Photo, folder: Path | None) -> ImageState:
    """`predictor.encode_image` of a photo, with its patch tokens cached in `folder`."""
    if folder is None:
        return predictor.encode_image(photo.picture)
    path = folder / f"{photo.index:06d}.pt"
    if path.is_file():
        patch = predictor.model.clip.patch_size
        input_size = model_input_size(*photo.picture.shape[:2], inference=predictor.inference, patch=patch)
        windows = sliding_windows(*input_size, inference=predictor.inference)
        tokens = torch.load(path, weights_only=True)
        return ImageState(photo.picture, input_size, windows, predictor.encoder_id, tokens)
    state = predictor.encode_image(photo.picture)
    temporary = path.with_suffix(f".{os.getpid()}.new")  # another process may evaluate the same photo
    torch.save(state.patch_tokens, temporary)
    os.replace(temporary, path)
    return state


# ---- questions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """The names that a photo shows and `ABSENT` others of its data set, chosen at random with the photo's stem as the seed."""

    names: list[int]  # indices, the present ones first
    present: int  # number of present names
    truth: Tensor  # (H, W) int64; index into `names`, -1 = none of them
    valid: Tensor  # (H, W) bool; False at void pixels

    @classmethod
    def about(cls, photo: Photo, classes: int) -> Question:
        """The question about a photo of a data set with `classes` names."""
        present = [number for number in photo.target.unique().tolist() if number >= 0]
        others = [number for number in range(classes) if number not in present]
        names = present + random.Random(photo.stem).sample(others, min(ABSENT, len(others)))
        position = torch.full((classes + 2,), -1)  # VOID and BACKGROUND are the last two
        position[names] = torch.arange(len(names))
        return cls(names, len(present), position[photo.target], photo.target != VOID)


def ask(
    predictor: Predictor, names: Sequence[str], state: ImageState, *, background: float | None, attention: bool = False
) -> Segmentation:
    """Segment a photo with names of a data set, spelled as in training. The name "other" has no special meaning here."""
    classes = [ClassName((plain(name),)) for name in names]
    return predictor.segment(classes, background=background, image=state, attention=attention)


# ---- counting -----------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """Sums over the photos of one data set."""

    joint: ConfusionMatrix  # with all names
    offset: ConfusionMatrix  # with all names and an offset
    present: ConfusionMatrix  # with the present names
    question: Means = field(default_factory=Means)  # measures of a `Question`
    photos: list[int] = field(default_factory=list)  # indices of the evaluated photos
    blank: list[int] = field(default_factory=list)  # indices of photos without a labelled pixel
    broken: list[str] = field(default_factory=list)  # an error message for each photo that cannot be read

    def merge(self, other: Counts) -> None:
        for total, part in zip(vars(self).values(), vars(other).values(), strict=True):
            add = total.extend if isinstance(total, list) else total.merge
            add(part)


def gather(counts: Counts) -> Counts:
    """The sum of the counts of all processes; each process must call it."""
    total, *others = gather_object([counts])
    for part in others:
        total.merge(part)
    seen = total.photos + total.blank
    assert len(seen) == len(set(seen)), "a photo was counted twice"
    return total


def evaluate_set(
    predictor: Predictor,
    dataset: SegmentationDataset,
    photos: Photos,
    *,
    seen: Sequence[bool],
    offset: float | None = OFFSET,
    joint_only: bool = False,
    layers: bool = False,
) -> Counts:
    """Segment the photos of a data set that belong to this process, and count.

    Args:
        seen: for each name of the data set, whether it was learned; the offset is subtracted from the scores of such names.
        offset: for `Counts.offset`; None leaves that matrix empty. layers: measure the attention of all layers.
        joint_only: decode each photo once, with all names; the other measures stay empty.
    """
    names, counts = dataset.names(), Counts(*(ConfusionMatrix(len(seen)) for _ in range(3)))
    offsets = None if offset is None else offset * torch.tensor(seen, dtype=torch.float32)
    folder = photos.patch_token_folder(dataset, predictor)
    for photo in photos.of(dataset):
        if isinstance(photo, str):
            logger.warning("skipped: %s", photo)
            counts.broken.append(photo)
            continue
        if not bool((photo.target >= 0).any()):
            counts.blank.append(photo.index)
            continue
        counts.photos.append(photo.index)
        state = encode(predictor, photo, folder)
        count_joint(counts, ask(predictor, names, state, background=None), photo.target, offsets)
        if joint_only:
            continue
        present = torch.unique(photo.target[photo.target >= 0])
        result = ask(predictor, [names[number] for number in present], state, background=None)
        counts.present.update(photo.target, present[torch.from_numpy(result.labels)])
        question = Question.about(photo, len(names))
        chosen = [names[number] for number in question.names]
        result = ask(predictor, chosen, state, background=predictor.calibration.threshold, attention=True)
        count_question(counts.question, result, question, layers=layers)
    return counts


def count_joint(counts: Counts, result: Segmentation, target: Tensor, offsets: Tensor | None) -> None:
    """Count the labels of a result with all names, with and without `offsets` (C,) subtracted from the scores."""
    labels = torch.from_numpy(result.labels)
    counts.joint.update(target, labels)
    if offsets is None:
        return
    labelled = target >= 0
    if offsets.min() == offsets.max():  # all classes are seen, or none: the labels stay the same
        counts.offset.update(target, labels)
    else:
        pixels = torch.from_numpy(result.scores)[:, labelled].T.contiguous()  # (pixels, C), for a fast argmax on a CPU
        counts.offset.update(target[labelled], (pixels - offsets).argmax(dim=1))


def count_question(means: Means, result: Segmentation, question: Question, *, layers: bool) -> None:
    """Add the measures of a result for a `Question`; train/evaluate.py defines them."""
    labels, truth, valid = result.labels, question.truth.numpy(), question.valid.numpy()
    means.add("right", labels[valid] == truth[valid])
    for number in range(question.present):
        guess, inside = labels == number, truth == number
        means.add("iou_present", metrics.mask_iou(guess[valid], inside[valid]))
        means.add("fragments", metrics.fragments(guess))
        means.add("fragments_truth", metrics.fragments(inside))
    depth = result.attention_shape[0]
    for layer in range(depth) if layers else range(depth)[-1:]:
        maps = result.attention_at(result.cross_attention(layer)[: question.present], result.size)[:, valid]
        for number, attention in enumerate(maps):
            inside = truth[valid] == number
            means.add(f"attention_ap {layer + 1}", metrics.average_precision(attention, inside))
            means.add(f"attention_contrast {layer + 1}", metrics.contrast(attention, inside))


# ---- calibration --------------------------------------------------------------------------------------------------------


def calibrate(predictor: Predictor, datasets: Sequence[SegmentationDataset], photos: Photos) -> Calibration:
    """Fit the calibration on a `Question` per photo and set it in the predictor; every process must call it.

    Scale and bias: `fit_calibration` of the masks of all names in the questions. Threshold: `best_threshold`. Each data set has
    the same weight: sets with a background need a high threshold, the others a low one. For sliding windows, whose scores
    are averaged, the calibration is an approximation. DataError if no photo has a labelled pixel.
    """
    predictor.calibration = Calibration()  # so that scores are sigmoids of the logits
    curves = [(ThresholdCurve(), BackgroundCurve()) for _ in datasets]
    for dataset, (masks, rejection) in zip(datasets, curves, strict=True):
        names, folder = dataset.names(), photos.patch_token_folder(dataset, predictor)
        for photo in photos.of(dataset):
            if isinstance(photo, str) or not bool((photo.target >= 0).any()):
                continue
            question = Question.about(photo, len(names))
            state = encode(predictor, photo, folder)
            result = ask(predictor, [names[number] for number in question.names], state, background=None)
            true_masks = question.truth == torch.arange(len(question.names))[:, None, None]
            masks.update(torch.logit(torch.from_numpy(result.scores)), true_masks, question.valid)
            labels, scores = map(torch.from_numpy, result.best_at(result.size))
            values = (torch.logit(scores), labels, question.truth)
            rejection.update(*(value[question.valid] for value in values), present=question.present)
    total, *others = gather_object([curves])
    for part in others:
        for sum_curve, part_curve in zip(chain(*total), chain(*part), strict=True):
            sum_curve.merge(part_curve)
    all_masks, all_rejection = zip(*total, strict=True)
    if not any(map(len, all_masks)):
        raise DataError("There is nothing to calibrate on: not one photo can be read and has a labelled pixel.")
    scale, bias = metrics.fit_calibration(all_masks)
    threshold = float(torch.sigmoid(torch.tensor(scale * metrics.best_threshold(all_rejection) + bias)))
    predictor.calibration = Calibration(scale, bias, threshold)
    return predictor.calibration
