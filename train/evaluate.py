"""Evaluates checkpoints on photos with masks.

    python train/evaluate.py --checkpoint runs/a/ldvc runs/a/zegclip --plain_clip lite --unseen lite_experiment
    python train/evaluate.py --checkpoint runs/coco/ldvc --data /data --sets voc2012 pascal_context59 --mode slide
    torchrun --nproc_per_node 2 train/evaluate.py --checkpoint assets/lite/ldvc --sets msrc --output runs/msrc

Every photo is segmented by `ldvc.predictor.Predictor`, as the page does it. With several processes each photo is decoded by
one of them. Photos that cannot be read are skipped, counted and listed.

How large a photo is shown to the model, and whether in sliding windows, is what the checkpoint says, or --mode. The protocol
of ZegCLIP and its followers is --mode slide: short side 512, windows of 512 every 426 pixels, scores averaged.

Measures of the literature, of all names of the data set (pixels of none of the classes, and void, are left out):
  pAcc, mIoU(S), mIoU(U), hIoU    of the name with the highest score; "offset": --offset subtracted from the scores of seen
                                  classes
Measures of a visitor, void left out:
  present_accuracy                share of labelled pixels that are right when only the names in the photo are given
The others are of one question: the names in the photo and three of the data set that are not, drawn by the photo's stem, at
the checkpoint's threshold of "none of these".
  right                           share of pixels that are right, pooled over photos; where the data set has a background,
                                  its pixels are right when they are none of the names
  iou_present                     IoU of the present classes in the label map, mean over (photo, present class)
  attention_ap                    average precision of the last layer's cross-attention ("mean" of the heads) as a ranking of
                                  the class's pixels at photo size, mean over (photo, present class); --layers: of each layer
  attention_contrast              mean of that map inside the class minus mean outside, likewise
  fragments                       connected components (8 neighbours) of at least 64 pixels of a present class in the label
                                  map at photo size, mean over (photo, present class); fragments_truth: in the truth
Numbers are shares, 0..1, but for fragments. Exact definitions: train/metrics.py.

A class is seen if the checkpoint saw masks of it under this name, a synonym of it (ldvc/synonyms.json), its singular or
plural, or as a kind of it in COCO-Stuff's manner ("sky-other", "wall-brick" are sky and wall); so "sofa" of VOC is seen after
training on "couch". --unseen names a split instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
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
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from ldvc.predictor import DEFAULT_INFERENCE, PLAIN_CLIP, Predictor
from train.data import LAYOUTS, open_sets
from train.evaluation import OFFSET, UNLIMITED, Counts, Photos, calibrate, evaluate_set, gather, unlimited
from train.metrics import harmonic_mean, mean_iou
from train.processes import start_processes
from train.tables import make_room, markdown, quoted_benchmark, write_tables
from train.words import read_renamed, rename_classes

logger = logging.getLogger("evaluate")
PROTOCOL = {"short_side": 512, "window": 512, "stride": 426}


# ---- one checkpoint -----------------------------------------------------------------------------------------------------


def measures(counts: Counts, seen: Sequence[bool]) -> dict[str, Any]:
    """All measures of one data set; NaN where a measure does not exist (mIoU(U) when every class is seen)."""
    unseen = [not flag for flag in seen]
    result: dict[str, Any] = {}
    for suffix, confusion in (("", counts.joint), ("_offset", counts.offset)):
        iou = confusion.iou()
        s, u = mean_iou(iou, seen), mean_iou(iou, unseen)
        result |= {
            f"pAcc{suffix}": confusion.pixel_accuracy(),
            f"mIoU{suffix}": mean_iou(iou),
            f"mIoU_S{suffix}": s,
            f"mIoU_U{suffix}": u,
            f"hIoU{suffix}": harmonic_mean(s, u),
        }
    result["present_accuracy"] = counts.present.pixel_accuracy()
    result |= {key: counts.visitor[key] for key in ("right", "iou_present", "fragments", "fragments_truth")}
    for key in ("attention_ap", "attention_contrast"):
        layers = sorted(int(name.removeprefix(key)) for name in counts.visitor if name.startswith(key))
        result[f"{key}_by_layer"] = {layer: counts.visitor[f"{key} {layer}"] for layer in layers}
        result[key] = counts.visitor[f"{key} {layers[-1]}"] if layers else math.nan
    return result


def class_table(counts: Counts, names: Sequence[str], sources: Sequence[str | None]) -> list[dict[str, Any]]:
    """One line per class: IoU, accuracy, true and predicted pixels, and the learned name that makes it seen (or null)."""
    matrix = counts.joint.counts
    columns = (counts.joint.iou(), counts.joint.accuracy(), matrix.sum(dim=1), matrix.sum(dim=0))
    keys = ("iou", "accuracy", "pixels", "predicted_pixels")
    return [
        {"name": name, "seen": source is not None, "seen_as": source, **dict(zip(keys, values, strict=True))}
        for name, source, *values in zip(names, sources, *(column.tolist() for column in columns), strict=True)
    ]


def chosen_inference(metadata: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """How large photos are shown: the checkpoint's way, changed by --mode, --long_side, --short_side, --window, --stride
    and --enlarge.

    Raises:
        LdvcError: the options contradict each other.
    """
    keys = ("long_side", "short_side", "window", "stride", "enlarge")
    own = dict(metadata.get("inference") or DEFAULT_INFERENCE)
    given = {key: options.get(key) for key in keys if options.get(key)}
    mode = options.get("mode")
    if mode == "whole" and given.keys() & {"window", "stride"}:
        raise LdvcError("--window and --stride belong to --mode slide, not to --mode whole.")
    if "long_side" in given and given.keys() & {"short_side", "window", "stride"}:
        raise LdvcError("Give --long_side alone, or --short_side (with --window and --stride for --mode slide).")
    if mode == "slide" or given.keys() & {"window", "stride"}:
        if "long_side" in given:
            raise LdvcError("--mode slide takes --short_side, --window and --stride, not --long_side.")
        result = PROTOCOL | (own if "window" in own else {}) | given
        if result["stride"] > result["window"]:
            raise LdvcError(
                f"A stride of {result['stride']} leaves gaps between windows of {result['window']} pixels; take a smaller one."
            )
    else:
        if "short_side" in given:  # the literature's way: however small photos are
            own = {}
        elif "long_side" in given:
            own = {key: value for key, value in own.items() if key == "enlarge"}
        result = own | given
        if mode == "whole":
            result = {key: value for key, value in result.items() if key not in ("window", "stride")}
    return result


def open_predictor(
    source: str,
    *,
    decoder: str | None = None,
    clip: str | FrozenClip | None = None,
    beside: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Predictor:
    """Loads what is to be evaluated; photos are shown to it as `chosen_inference` says.

    Args:
        source: checkpoint folder, Hub id or "lite"; with decoder "clip" the towers ("lite", a folder, or architecture:weights).
        decoder: which decoder, where the source holds several; "clip" (plain similarity) needs no checkpoint.
        clip: towers that are built already.
        beside: with decoder "clip", metadata of the checkpoint beside which it stands, as on the page: its `inference` and
            `clip_calibration` count.
        options: see `chosen_inference`.

    Raises:
        LdvcError: the checkpoint or the options cannot be used.
    """
    if decoder == PLAIN_CLIP:
        towers, _, weights = source.partition(":")
        if clip is None and towers in open_clip.list_models() and not weights:
            raise LdvcError(f"{towers} alone has random weights; name those to evaluate, for example {towers}:openai.")
        model = LDVC(ModelConfig(clip=towers, pretrained=weights or None, visual_prompts=0), clip=clip)
        metadata = {key: beside[key] for key in ("inference", "clip_calibration") if key in (beside or {})}
    else:
        model, metadata = load_checkpoint(source, decoder=decoder, clip=clip)
    inference = unlimited(chosen_inference(metadata, options or {}))
    device = PartialState().device
    return Predictor(
        model, metadata | {"inference": inference}, decoder=decoder, device=device, source=str(source)
    )


def evaluate(
    predictor: Predictor,
    datasets: Sequence[Any],
    *,
    unseen: frozenset[str] | None = None,
    fit: bool = False,
    offset: float = OFFSET,
    joint_only: bool = False,
    layers: bool = False,
    cache_dir: str | None = None,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Evaluates a predictor on some data sets; every process of a run calls it.

    Args:
        unseen: canonical names that count as unseen; None takes the checkpoint's list of seen names.
        fit: first calibrate on these photos and, unless it is plain similarity, write that into the checkpoint's config.json.
        offset, joint_only, layers: see `train.evaluation.evaluate_set`.
        cache_dir, num_workers: see `train.evaluation.Photos`.

    Returns:
        {"source", "decoder", "calibration", "inference", "offset", "sets": {set: {measure: value, "classes": [...],
        "confusion": [[...]], "broken": [...], ...}}}.

    Raises:
        LdvcError: not one photo of a set can be read or has labels.
    """
    state = PartialState()
    photos = Photos(cache_dir, state.process_index, state.num_processes, num_workers)
    if fit:
        calibrate(predictor, datasets, photos)
        if predictor.decoder != PLAIN_CLIP and state.is_main_process:
            write_calibration(predictor.source, predictor.decoder, predictor.calibration)

    def learned_name(name: str) -> str | None:
        if unseen is not None:
            return None if canonical(name) in unseen else name
        return predictor.seen_names.source(name)

    result: dict[str, Any] = {
        "source": predictor.source,
        "decoder": predictor.decoder,
        "calibration": asdict(predictor.calibration),
        "inference": {key: value for key, value in predictor.inference.items() if value != UNLIMITED},
        "offset": offset,
        "sets": {},
    }
    for dataset in datasets:
        started, names = time.monotonic(), dataset.names()
        sources = [learned_name(name) for name in names]
        unseen_names = [name for name, by in zip(names, sources, strict=True) if by is None]
        counts = gather(
            evaluate_set(
                predictor,
                dataset,
                photos,
                seen=lambda name: learned_name(name) is not None,
                offset=offset,
                joint_only=joint_only,
                layers=layers,
            )
        )
        seconds = time.monotonic() - started
        if not counts.photos and not counts.blank:
            raise DataError(f"Not one photo of {dataset.name} can be read. The first: {counts.broken[0]}")
        if not counts.photos:
            raise DataError(f"Not one mask of {dataset.name} {dataset.split} labels a pixel with a class; look at them.")
        if state.is_main_process:
            each = seconds / len(dataset)
            logger.info("%s %s on %s: %.2f s a photo", predictor.decoder, predictor.source, dataset.name, each)
        result["sets"][dataset.name] = measures(counts, [by is not None for by in sources]) | {
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
    """Puts a calibration into a local checkpoint's config.json; `key` is "clip_calibration" for plain similarity.

    Raises:
        LdvcError: the checkpoint is not a local folder.
    """
    for folder in (Path(source), Path(source) / decoder):
        path = folder / "config.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            content[key] = asdict(calibration)
            temporary = path.with_suffix(".json.new")
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, path)
            return
    require_local(source)
    raise LdvcError(f"{source} holds no checkpoint of {decoder}, so its calibration cannot be written.")


def require_local(source: str) -> None:
    """
    Raises:
        LdvcError: the checkpoint is not a local folder, so that nothing can be written into it.
    """
    if not Path(source).is_dir():
        raise LdvcError(f"{source} is no local checkpoint folder, so its calibration cannot be written; give a folder.")


# ---- command line -------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="*", default=[], help="checkpoint folders, Hub ids or 'lite'")
    parser.add_argument("--decoder", help="which decoder, where a checkpoint holds several")
    parser.add_argument(
        "--plain_clip",
        metavar="CLIP",
        help="also evaluate plain similarity of these towers: 'lite', a folder, or ViT-B-16-quickgelu:openai",
    )
    parser.add_argument("--data", default="data", help="folder that holds the data sets")
    parser.add_argument("--sets", nargs="+", default=["msrc", "coco-mini"], help="default: msrc coco-mini")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=[],
        metavar="SET=LAYOUT",
        help=f"where it is not found out: {', '.join(LAYOUTS)}",
    )
    parser.add_argument(
        "--rename", metavar="FILE", help='JSON file {"grass": "lawn"}: ask for classes by other words than the data set\'s'
    )
    parser.add_argument("--unseen", help="split of unseen classes; default: what the checkpoint has not seen")
    parser.add_argument("--mode", choices=("whole", "slide"), help="default: what the checkpoint says")
    parser.add_argument("--long_side", type=int, help="of the whole photo in pixels")
    parser.add_argument("--short_side", type=int, help="of the photo in pixels, whole or under sliding windows")
    parser.add_argument("--window", type=int, help="side of a sliding window in pixels")
    parser.add_argument("--stride", type=int, help="step of a sliding window in pixels")
    parser.add_argument("--enlarge", type=float, help="how much small photos are enlarged at most; default: the checkpoint's")
    parser.add_argument(
        "--offset", type=float, default=OFFSET, help=f"gamma, off the scores of seen classes; {OFFSET:g}"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first fit scores and threshold on these photos, and write them into the checkpoint",
    )
    parser.add_argument(
        "--cache_dir", help="keep the frozen stem's outputs there: saves time with lite, not with ViT-B/16"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read photos ahead")
    parser.add_argument(
        "--joint_only", action="store_true", help="the literature's measures only: one decoding per photo"
    )
    parser.add_argument("--layers", action="store_true", help="a table of the attention of every layer, too")
    parser.add_argument("--output", help="writes OUTPUT.json, OUTPUT.md and OUTPUT-*.png (confusion matrices)")
    options = parser.parse_args(arguments)
    for name in ("long_side", "short_side", "window", "stride"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is a number of pixels of at least 1, not {value}")
    if options.enlarge is not None and options.enlarge <= 0:
        parser.error(f"--enlarge is a factor above 0, not {options.enlarge}")
    for pair in options.layouts:
        if "=" not in pair or pair.partition("=")[0] not in options.sets:
            parser.error(f"--layouts takes SET=LAYOUT with a set of --sets, not {pair}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """The command; what a user can set right ends in one sentence."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        layouts = dict(pair.split("=", 1) for pair in options.layouts)
        datasets = open_sets(options.data, options.sets, options.split, layouts=layouts)
        if options.rename:
            rename_classes(datasets, read_renamed(options.rename))
        unseen = load_split(options.unseen) if options.unseen else None
        jobs = [(source, options.decoder) for source in options.checkpoint]
        jobs += [(options.plain_clip, PLAIN_CLIP)] if options.plain_clip else []
        if not jobs:
            raise LdvcError("Nothing to evaluate: give --checkpoint or --plain_clip.")
        for source in options.checkpoint if options.calibrate else ():
            require_local(source)
        if options.output:
            make_room(options.output)
        start_processes(__file__, sys.argv[1:])
        on_cpu = not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu)
        results: list[dict[str, Any]] = []
        beside: dict[str, Any] | None = None  # metadata of the first checkpoint
        for source, decoder in jobs:
            predictor = open_predictor(
                source,
                decoder=decoder,
                beside=beside,
                options=vars(options),
            )
            beside = beside or predictor.metadata
            result = evaluate(
                predictor,
                datasets,
                unseen=frozenset() if decoder == PLAIN_CLIP and unseen is None else unseen,
                fit=options.calibrate,
                offset=options.offset,
                joint_only=options.joint_only,
                layers=options.layers,
                cache_dir=options.cache_dir,
                num_workers=options.num_workers,
            )
            results.append(result)
        if options.plain_clip:
            if options.calibrate and state.is_main_process:
                for result in results[:-1]:
                    write_calibration(
                        result["source"], result["decoder"], predictor.calibration, key="clip_calibration"
                    )
            results.insert(0, results.pop())  # what all others are compared with
        if state.is_main_process:
            print(markdown(results))
            if options.output:
                write_tables(results, options.output)
    except LdvcError as error:  # every process finds the same mistake; one says it
        sys.exit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()


if __name__ == "__main__":
    main()
