"""Evaluates checkpoints on photos with masks.

    python train/evaluate.py --checkpoint runs/a/ldvc runs/a/zegclip --plain_clip lite --unseen lite_experiment
    python train/evaluate.py --checkpoint runs/coco/ldvc --data /data --sets voc2012 pascal_context59 --mode slide
    torchrun --nproc_per_node 2 train/evaluate.py --checkpoint assets/lite/ldvc --sets msrc --output runs/msrc

Every photo is segmented by `ldvc.predictor.Predictor`, as on the page. Several processes share the photos. Photos that cannot
be read are skipped, counted and listed.

The size of photos and the use of sliding windows come from the checkpoint or from --mode. --mode slide is the protocol of
ZegCLIP and later work: short side 512, windows of 512 pixels every 426 pixels, scores averaged.

Measures of the literature, with all names of the data set (background and void pixels are left out):
  pAcc, mIoU(S), mIoU(U), hIoU    with the name of the highest score; "offset": after --offset is subtracted from the scores of
                                  seen classes
Measure with the names that the photo shows:
  present_accuracy                share of correct labelled pixels
Measures with the names that the photo shows, three other names of the data set (chosen with the photo's stem as the seed), and
"none of these" below the checkpoint's threshold; void pixels are left out:
  right                           share of correct pixels of all photos; if the data set has a background, a background pixel is
                                  correct if it is "none of these"
  iou_present                     IoU of a present class, mean over (photo, present class)
  attention_ap                    average precision of the last layer's cross-attention (mean of the heads) as a ranking of the
                                  class's pixels at photo size, mean over (photo, present class); --layers: of each layer
  attention_contrast              mean of this attention inside the class minus its mean outside, likewise averaged
  fragments                       connected components (8 neighbours) of at least 64 pixels of a present class in the label map
                                  at photo size, mean over (photo, present class); fragments_truth: in the masks
All numbers but fragments are shares, 0..1. Exact definitions: train/metrics.py.

A class is seen if the checkpoint has learned masks of it under this name, a synonym (ldvc/synonyms.json), its singular or
plural, or as a hyponym in the manner of COCO-Stuff ("sky-other" and "wall-brick" are sky and wall). So "sofa" of VOC is seen
after training on "couch". --unseen names a split instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import open_clip
import torch
from accelerate import PartialState

from ldvc.calibration import Calibration
from ldvc.checkpoint import load_checkpoint
from ldvc.class_names import canonical, load_split
from ldvc.config import ModelConfig
from ldvc.errors import DataError, LdvcError
from ldvc.inference import require_inference
from ldvc.modeling.model import LDVC
from ldvc.predictor import DEFAULT_INFERENCE, PLAIN_CLIP, Predictor
from train.config import make_writable
from train.data import SegmentationDataset, open_sets
from train.data.vocabulary import rename_classes
from train.evaluation import OFFSET, UNLIMITED, Counts, Photos, calibrate, evaluate_set, gather, unlimited
from train.files import write_json
from train.metrics import iou_measures
from train.tables import current_commit, markdown, quoted_benchmark, write_tables

logger = logging.getLogger("evaluate")
PROTOCOL = {"short_side": 512, "window": 512, "stride": 426}


def measures(counts: Counts, seen: Sequence[bool]) -> dict[str, Any]:
    """All measures of one data set; NaN where a measure does not exist (mIoU(U) if every class is seen)."""
    result: dict[str, Any] = iou_measures(counts.joint, seen)
    result |= {f"{key}_offset": value for key, value in iou_measures(counts.offset, seen).items()}
    result["present_accuracy"] = counts.present.pixel_accuracy()
    result |= {key: counts.question[key] for key in ("right", "iou_present", "fragments", "fragments_truth")}
    for key in ("attention_ap", "attention_contrast"):
        layers = sorted(int(name.removeprefix(key)) for name in counts.question if name.startswith(key))
        by_layer = {layer: counts.question[f"{key} {layer}"] for layer in layers}
        result |= {f"{key}_by_layer": by_layer, key: by_layer[layers[-1]] if layers else float("nan")}
    return result


def class_table(counts: Counts, names: Sequence[str], sources: Sequence[str | None]) -> list[dict[str, Any]]:
    """One row per class: IoU, accuracy, true and predicted pixels, and the learned name that makes it seen, or None."""
    matrix = counts.joint.counts
    columns = (counts.joint.iou(), counts.joint.accuracy(), matrix.sum(dim=1), matrix.sum(dim=0))
    keys = ("iou", "accuracy", "pixels", "predicted_pixels")
    return [
        {"name": name, "seen": source is not None, "seen_as": source, **dict(zip(keys, values, strict=True))}
        for name, source, *values in zip(names, sources, *(column.tolist() for column in columns), strict=True)
    ]


def chosen_inference(metadata: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's inference settings, changed by --mode, --long_side, --short_side, --window, --stride and --enlarge.

    LdvcError if the options contradict each other, or a number is not allowed.
    """
    keys = ("long_side", "short_side", "window", "stride", "enlarge")
    inherited = dict(metadata.get("inference") or DEFAULT_INFERENCE)
    chosen = {key: options[key] for key in keys if options.get(key) is not None}
    mode, sliding = options.get("mode"), chosen.keys() & {"window", "stride"}
    if mode == "whole" and sliding:
        raise LdvcError("--window and --stride belong to --mode slide, not to --mode whole.")
    if "long_side" in chosen and (mode == "slide" or sliding or "short_side" in chosen):
        raise LdvcError("Give --long_side alone, or --short_side (with --window and --stride for --mode slide).")
    if mode == "slide" or sliding:
        result = PROTOCOL | (inherited if "window" in inherited else {}) | chosen
    else:
        if "short_side" in chosen:
            inherited = {}
        elif "long_side" in chosen:
            inherited = {key: value for key, value in inherited.items() if key == "enlarge"}
        removed = ("window", "stride") if mode == "whole" else ()
        result = {key: value for key, value in (inherited | chosen).items() if key not in removed}
    try:
        require_inference(result)
    except ValueError as error:
        raise LdvcError(f"These sizes of photos cannot be used: {error}.") from None
    return result


def open_predictor(
    source: str, *, decoder: str | None = None, compared_with: Mapping[str, Any] = {}, options: Mapping[str, Any] = {}
) -> Predictor:
    """Load a checkpoint, or towers for plain similarity; LdvcError if it or the options cannot be used.

    Args:
        source: checkpoint folder, Hub id or "lite"; with decoder "clip" the towers ("lite", a folder, or architecture:weights).
        compared_with: metadata of a checkpoint; decoder "clip" uses its `inference` and `clip_calibration`, as on the page.
        options: see `chosen_inference`.
    """
    if decoder == PLAIN_CLIP:
        towers, _, weights = source.partition(":")
        if towers in open_clip.list_models() and not weights:
            raise LdvcError(f"{towers} alone has random weights; name those to evaluate, for example {towers}:openai.")
        model = LDVC(ModelConfig(clip=towers, pretrained=weights or None, visual_prompts=0))
        metadata = {key: compared_with[key] for key in ("inference", "clip_calibration") if key in compared_with}
    else:
        model, metadata = load_checkpoint(source, decoder=decoder)
    metadata = metadata | {"inference": unlimited(chosen_inference(metadata, options))}
    return Predictor(model, metadata, decoder=decoder, device=PartialState().device, source=str(source))


def evaluate(
    predictor: Predictor,
    datasets: Sequence[SegmentationDataset],
    *,
    unseen: frozenset[str] | None = None,
    fit: bool = False,
    offset: float = OFFSET,
    joint_only: bool = False,
    layers: bool = False,
    cache_dir: str | None = None,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Evaluate a predictor on data sets; every process of a run calls it.

    Args:
        unseen: canonical names that count as unseen; None uses the checkpoint's list of seen names.
        fit: first calibrate on these photos and, except for plain similarity, write the result into config.json.

    Returns:
        {"source", "decoder", "calibration", "inference", "offset", "sets": {set: {measure: value, "classes": [...],
        "confusion": [[...]], "broken": [...], ...}}}. LdvcError if no photo of a set can be read or has labels.
    """
    photos, main_process = Photos(cache_dir, num_workers), PartialState().is_main_process
    if fit:
        calibrate(predictor, datasets, photos)
        if predictor.decoder != PLAIN_CLIP and main_process:
            write_calibration(predictor.source, predictor.decoder, predictor.calibration)

    def learned_name(name: str) -> str | None:
        if unseen is not None:
            return None if canonical(name) in unseen else name
        return predictor.seen_names.source(name)

    inference = {key: value for key, value in predictor.inference.items() if value != UNLIMITED}
    result: dict[str, Any] = {"source": predictor.source, "decoder": predictor.decoder}
    result |= {"calibration": asdict(predictor.calibration), "inference": inference, "offset": offset, "sets": {}}
    for dataset in datasets:
        started, names = time.monotonic(), dataset.names()
        sources = [learned_name(name) for name in names]
        seen = [source is not None for source in sources]
        options = {"offset": offset, "joint_only": joint_only, "layers": layers}
        counts = gather(evaluate_set(predictor, dataset, photos, seen=seen, **options))
        seconds = time.monotonic() - started
        if not counts.photos and not counts.blank:
            raise DataError(f"Not one photo of {dataset.name} can be read. The first: {counts.broken[0]}")
        if not counts.photos:
            raise DataError(f"Not one mask of {dataset.name} {dataset.split} labels a pixel with a class; look at them.")
        if main_process:
            seconds_per_photo = seconds / len(dataset)
            logger.info("%s %s on %s: %.2f s a photo", predictor.decoder, predictor.source, dataset.name, seconds_per_photo)
        unseen_names = [name for name, source in zip(names, sources, strict=True) if source is None]
        result["sets"][dataset.name] = measures(counts, seen) | {
            "split": dataset.split,
            "photos": len(counts.photos) + len(counts.blank),
            "broken": counts.broken,
            "seconds": seconds,
            "iou": dict(zip(names, counts.joint.iou().tolist(), strict=True)),
            "unseen": unseen_names,
            "classes": class_table(counts, names, sources),
            "confusion": counts.joint.counts.tolist(),
            "benchmark": quoted_benchmark(dataset, unseen_names),
        }
    return result


def write_calibration(source: str, decoder: str, calibration: Calibration, *, key: str = "calibration") -> None:
    """Write a calibration into the config.json of a local checkpoint; `key` is "clip_calibration" for plain similarity."""
    file = Path(source) / "config.json"
    if not file.is_file():  # a folder with several decoders
        file = Path(source) / decoder / "config.json"
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | {key: asdict(calibration)})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", nargs="*", default=[], help="checkpoint folders, Hub ids or 'lite'")
    add("--decoder", help="which decoder of checkpoints with several")
    add("--plain_clip", metavar="CLIP", help="also plain similarity of CLIP: 'lite', a folder, or ViT-B-16-quickgelu:openai")
    add("--data", default="data", help="folder that holds the data sets")
    add("--sets", nargs="+", default=["msrc", "coco-mini"], help="default: msrc coco-mini")
    add("--split", default="val", help="default: val")
    add("--rename", metavar="FILE", help='JSON file {"grass": "lawn"} with other words for classes of the data sets')
    add("--unseen", help="split of unseen classes; default: the classes that the checkpoint has not seen")
    add("--mode", choices=("whole", "slide"), help="default: the checkpoint's")
    add("--long_side", type=int, help="long side of the whole photo in pixels")
    add("--short_side", type=int, help="short side of the photo in pixels, whole or with sliding windows")
    add("--window", type=int, help="side of a sliding window in pixels")
    add("--stride", type=int, help="step of a sliding window in pixels")
    add("--enlarge", type=float, help="largest factor by which small photos are enlarged; default: the checkpoint's")
    add("--offset", type=float, default=OFFSET, help=f"gamma, subtracted from the scores of seen classes; default: {OFFSET:g}")
    add("--calibrate", action="store_true", help="fit scores and threshold on these photos first, and store them in CHECKPOINT")
    add("--cache_dir", help="folder for cached outputs of the patch embedding; saves time with lite, not with ViT-B/16")
    add("--num_workers", type=int, default=0, help="processes that load photos")
    add("--joint_only", action="store_true", help="only the measures of the literature: one decoding per photo")
    add("--layers", action="store_true", help="also a table of the attention of every layer")
    add("--output", help="writes OUTPUT.json, OUTPUT.csv, OUTPUT.md and OUTPUT-*.png (confusion matrices)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, command: str) -> None:
    """Evaluates what the command line asks for, and prints and writes the tables."""
    if not options.checkpoint and not options.plain_clip:
        raise LdvcError("Nothing to evaluate: give --checkpoint or --plain_clip.")
    datasets = open_sets(options.data, options.sets, options.split)
    if options.rename:
        rename_classes(datasets, options.rename)
    unseen = load_split(options.unseen) if options.unseen else None
    for source in options.checkpoint if options.calibrate else ():
        if not Path(source).is_dir():
            raise LdvcError(f"{source} is no local checkpoint folder, so its calibration cannot be written; give a folder.")
    if options.output:
        make_writable(Path(options.output).parent, "--output")
    if options.cache_dir:
        make_writable(options.cache_dir, "--cache_dir")
    main_process = PartialState(cpu=not torch.cuda.is_available()).is_main_process
    shared = {key: getattr(options, key) for key in ("offset", "joint_only", "layers", "cache_dir", "num_workers")}
    results: list[dict[str, Any]] = []
    compared_with: dict[str, Any] = {}  # metadata of the first checkpoint
    plain = [(options.plain_clip, PLAIN_CLIP)] if options.plain_clip else []
    for source, decoder in [*((source, options.decoder) for source in options.checkpoint), *plain]:
        predictor = open_predictor(source, decoder=decoder, compared_with=compared_with, options=vars(options))
        compared_with = compared_with or predictor.metadata
        own_unseen = frozenset() if decoder == PLAIN_CLIP and unseen is None else unseen
        result = evaluate(predictor, datasets, unseen=own_unseen, fit=options.calibrate, **shared)
        results.append(result | {"command": command, "commit": current_commit()})
    if plain:
        if options.calibrate and main_process:
            for result in results[:-1]:
                write_calibration(result["source"], result["decoder"], predictor.calibration, key="clip_calibration")
        results.insert(0, results.pop())  # all others are compared with it
    if main_process:
        print(markdown(results))
        if options.output:
            write_tables(results, options.output)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; an error of the user ends it with one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(options, shlex.join(["python", "train/evaluate.py", *arguments]))
    except LdvcError as error:  # the same in every process; the first one reports it
        sys.exit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()


if __name__ == "__main__":
    main()
