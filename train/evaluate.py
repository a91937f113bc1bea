"""Evaluates checkpoints on photos with masks.

    python train/evaluate.py --checkpoint runs/a/ldvc runs/a/zegclip --clip_arm lite --unseen lite_experiment
    python train/evaluate.py --checkpoint runs/coco/ldvc --data /data --sets voc2012 pascal_context59 --mode slide
    torchrun --nproc_per_node 2 train/evaluate.py --checkpoint assets/lite/ldvc --sets msrc --output runs/msrc

Every photo is decoded in one joint pass over all names of its data set, and once more with only the names it carries. With
several processes each photo is decoded by one of them. Photos that cannot be read are skipped, counted and listed.

How large a photo is shown to the model, and whether in sliding windows, is what the checkpoint says, or --mode. The protocol
of ZegCLIP and its followers is --mode slide: short side 512, windows of 512 every 426 pixels, sigmoids averaged.

Measures of the literature (pixels of none of the classes, and void, are left out):
  pAcc, mIoU(S), mIoU(U), hIoU    argmax over the sigmoid scores; "offset": --offset subtracted from the scores of seen classes
Measures of a visitor of the page:
  present_accuracy                share of pixels right when only the names in the photo are given
  single_iou                      IoU of "score > 0.5" of one present class against everything else, background
                                  included, decoded with all names; mean over (photo, class); `_present`: decoded with
                                  the names in the photo; `_alone`: decoded with that one name
Numbers are shares, 0..1.

A class is seen if the checkpoint saw masks of it under this name, a synonym of it (ldvc/data/synonyms.json), its singular or
plural, or as a kind of it in COCO-Stuff's manner ("sky-other", "wall-brick" are sky and wall); so "sofa" of VOC is seen after
training on "couch". --unseen names a split instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import open_clip
import torch
from accelerate import PartialState

from ldvc.checkpoint import load_checkpoint
from ldvc.config import ModelConfig
from ldvc.data import LAYOUTS, canonical, load_split, open_sets
from ldvc.errors import DataError, LdvcError
from ldvc.metrics import fit_calibration, harmonic_mean, mean_iou
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from ldvc.names import SeenNames
from train.processes import resolved_precision, start_processes
from train.tables import make_room, markdown, quoted_benchmark, write_tables
from train.tally import DEFAULT_INFERENCE, OFFSET, Tally, gather, tally_set
from train.words import read_renamed, rename_classes

logger = logging.getLogger("evaluate")
PROTOCOL = {"short_side": 512, "window": 512, "stride": 426}


# ---- one checkpoint -----------------------------------------------------------------------------------------------------


def measures(tally: Tally, seen: Sequence[bool], calibration: Mapping[str, float]) -> dict[str, float]:
    """All measures of one data set; NaN where a measure does not exist (mIoU(U) when every class is seen)."""
    unseen = [not flag for flag in seen]
    result: dict[str, float] = {}
    for suffix, confusion in (("", tally.joint), ("_offset", tally.offset)):
        iou = confusion.iou()
        s, u = mean_iou(iou, seen), mean_iou(iou, unseen)
        result |= {
            f"pAcc{suffix}": confusion.pixel_accuracy(),
            f"mIoU{suffix}": mean_iou(iou),
            f"mIoU_S{suffix}": s,
            f"mIoU_U{suffix}": u,
            f"hIoU{suffix}": harmonic_mean(s, u),
        }
    threshold = -calibration["bias"] / calibration["scale"]
    result["present_accuracy"] = tally.present.pixel_accuracy()
    result["single_iou"] = tally.curves["joint"].mean_iou_at(threshold)
    result["single_iou_present"] = tally.curves["present"].mean_iou_at(threshold)
    result["single_iou_alone"] = tally.curves["alone"].mean_iou_at(threshold)
    return result


def class_table(tally: Tally, names: Sequence[str], sources: Sequence[str | None]) -> list[dict[str, Any]]:
    """One line per class: IoU, accuracy, true and predicted pixels, and the learned name that makes it seen (or null)."""
    counts = tally.joint.counts
    columns = (tally.joint.iou(), tally.joint.accuracy(), counts.sum(dim=1), counts.sum(dim=0))
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


def evaluate(
    source: str,
    datasets: Sequence[Any],
    *,
    arm: str | None = None,
    clip: str | FrozenClip | None = None,
    unseen: frozenset[str] | None = None,
    calibrate: bool = False,
    peak: float = 0.0,
    shown: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **tallying: Any,
) -> dict[str, Any]:
    """Evaluates one checkpoint, or plain similarity, on some data sets; every process of a run calls it.

    Args:
        source: checkpoint folder, Hub id or "lite"; with arm "clip" the towers ("lite", a folder, or architecture:weights).
        arm: which arm, where the source holds several; "clip" needs no checkpoint.
        unseen: canonical names that count as unseen; None takes the checkpoint's list of seen names.
        calibrate: fit scale and bias on these photos and write them into the checkpoint's config.json, with
        peak: how far the threshold follows each name's own peak (`ldvc.calibration`).
        shown: with arm "clip", the `inference` of the checkpoint beside which it stands, on the page, too; towers have none.
        options: see `chosen_inference`.
        tallying: offset, bf16, cache_dir, joint_only, alone and num_workers of `train.tally.tally_set`.

    Returns:
        {"source", "arm", "calibration", "inference", "offset", "sets": {set: {measure: value, "classes": [...],
        "confusion": [[...]], "broken": [...], ...}}}.

    Raises:
        LdvcError: the checkpoint cannot be used, or not one photo of a set can be read or has labels.
    """
    state = PartialState()
    calibration = {"scale": 1.0, "bias": 0.0, "peak": 0.0}
    if arm == "clip":
        towers, _, weights = source.partition(":")
        if clip is None and towers in open_clip.list_models() and not weights:
            raise LdvcError(f"{towers} alone has random weights; name those to evaluate, for example {towers}:openai.")
        model = LDVC(ModelConfig(clip=towers, pretrained=weights or None, visual_prompts=0), clip=clip)
        metadata: dict[str, Any] = {"inference": shown}
    else:
        model, metadata = load_checkpoint(source, arm=arm, clip=clip)
        arm = model.config.arm
        calibration |= metadata.get("calibration") or {}
    model.to(state.device)
    if calibrate:
        calibration["peak"] = peak
    learned = SeenNames(metadata.get("seen_names") or (), metadata.get("seen_words") or {})
    inference = chosen_inference(metadata, options or {})

    def learned_name(name: str) -> str | None:
        if unseen is not None:
            return None if canonical(name) in unseen else name
        return learned.source(name)

    tallies, seconds = {}, {}
    for dataset in datasets:
        started = time.monotonic()
        tally = tally_set(
            model,
            arm,
            dataset,
            seen=lambda name: learned_name(name) is not None,
            inference=inference,
            peak=calibration["peak"],
            process=state.process_index,
            processes=state.num_processes,
            **tallying,
        )
        tally = tallies[dataset.name] = gather(tally)
        seconds[dataset.name] = time.monotonic() - started
        if not tally.photos and not tally.blank:
            raise DataError(f"Not one photo of {dataset.name} can be read. The first: {tally.broken[0]}")
        if not tally.photos:
            raise DataError(
                f"Not one mask of {dataset.name} {dataset.split} labels a pixel with a class; look at them."
            )
        if state.is_main_process:
            logger.info("%s %s on %s: %.2f s a photo", arm, source, dataset.name, seconds[dataset.name] / len(dataset))
    if calibrate:
        scale, bias = fit_calibration([curve for tally in tallies.values() for curve in tally.curves.values()])
        calibration |= {"scale": scale, "bias": bias}
        if arm != "clip" and state.is_main_process:
            write_calibration(source, arm, calibration)
    result: dict[str, Any] = {"source": str(source), "arm": arm, "calibration": calibration, "inference": inference}
    result |= {"offset": tallying.get("offset", OFFSET), "sets": {}}
    for dataset in datasets:
        tally, names = tallies[dataset.name], dataset.names()
        sources = [learned_name(name) for name in names]
        unseen_names = [name for name, by in zip(names, sources, strict=True) if by is None]
        result["sets"][dataset.name] = measures(tally, [by is not None for by in sources], calibration) | {
            "split": dataset.split,
            "photos": len(tally.photos) + len(tally.blank),
            "broken": tally.broken,
            "seconds": seconds[dataset.name],
            "iou": dict(zip(names, tally.joint.iou().tolist(), strict=True)),
            "unseen": unseen_names,
            "classes": class_table(tally, names, sources),
            "confusion": tally.joint.counts.tolist(),
            "benchmark": quoted_benchmark(dataset, unseen_names),
        }
    return result


def write_calibration(source: str, arm: str, calibration: dict[str, float], *, key: str = "calibration") -> None:
    """Puts a calibration into a local checkpoint's config.json; `key` is "clip_calibration" for plain similarity.

    Raises:
        LdvcError: the checkpoint is not a local folder.
    """
    for folder in (Path(source), Path(source) / arm):
        path = folder / "config.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            content[key] = calibration
            temporary = path.with_suffix(".json.new")
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, path)
            return
    require_local(source)
    raise LdvcError(f"{source} holds no checkpoint of {arm}, so its calibration cannot be written.")


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
    parser.add_argument("--arm", help="which arm, where a checkpoint holds several")
    parser.add_argument(
        "--clip_arm",
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
        "--calibrate", action="store_true", help="fit score calibration here and write it into the checkpoint"
    )
    parser.add_argument(
        "--peak", type=float, default=0.4, help="with --calibrate: how far the threshold follows a name's peak, 0 to 1"
    )
    parser.add_argument(
        "--cache_dir", help="keep the frozen stem's outputs there: saves time with lite, not with ViT-B/16"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read photos ahead")
    parser.add_argument("--full_precision", action="store_true", help="no bfloat16 even where the device is made for it")
    parser.add_argument(
        "--joint_only", action="store_true", help="the literature's measures only: one decoding per photo"
    )
    parser.add_argument("--not_alone", action="store_true", help="leave out single_iou_alone")
    parser.add_argument("--output", help="writes OUTPUT.json, OUTPUT.md and OUTPUT-*.png (confusion matrices)")
    options = parser.parse_args(arguments)
    for name in ("long_side", "short_side", "window", "stride"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is a number of pixels of at least 1, not {value}")
    if options.enlarge is not None and options.enlarge <= 0:
        parser.error(f"--enlarge is a factor above 0, not {options.enlarge}")
    if not 0 <= options.peak <= 1:
        parser.error(f"--peak is a share from 0 to 1, not {options.peak}")
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
        jobs = [(source, options.arm) for source in options.checkpoint]
        jobs += [(options.clip_arm, "clip")] if options.clip_arm else []
        if not jobs:
            raise LdvcError("Nothing to evaluate: give --checkpoint or --clip_arm.")
        if options.calibrate and options.joint_only:
            raise LdvcError("--calibrate needs the masks that --joint_only leaves out; give only one of them.")
        for source in options.checkpoint if options.calibrate else ():
            require_local(source)
        if options.output:
            make_room(options.output)
        start_processes(__file__, sys.argv[1:])
        on_cpu = not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu)
        bf16 = not options.full_precision and resolved_precision("auto", on_cpu=on_cpu) == "bf16"
        results: list[dict[str, Any]] = []
        for source, arm in jobs:
            result = evaluate(
                source,
                datasets,
                arm=arm,
                unseen=frozenset() if arm == "clip" and unseen is None else unseen,
                calibrate=options.calibrate,
                peak=options.peak,
                shown=results[0]["inference"] if results else None,
                options=vars(options),
                offset=options.offset,
                cache_dir=options.cache_dir,
                bf16=bf16,
                joint_only=options.joint_only,
                alone=not options.not_alone,
                num_workers=options.num_workers,
            )
            results.append(result)
        if options.clip_arm:
            results.insert(0, results.pop())  # what all others are compared with
        if state.is_main_process:
            if options.calibrate and options.clip_arm:
                for result in results[1:]:
                    write_calibration(
                        result["source"], result["arm"], results[0]["calibration"], key="clip_calibration"
                    )
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
