"""Evaluates checkpoints on photos with masks.

    python train/evaluate.py --checkpoint runs/a/ldvc runs/a/zegclip --clip_arm lite --unseen lite_experiment
    python train/evaluate.py --checkpoint assets/lite/ldvc --sets msrc coco-mini --split train --calibrate

Every photo is decoded in one joint pass over all names of its data set, and once more with only the names it carries.

Measures of the literature (pixels of none of the classes, and void, are left out):
  pAcc, mIoU(S), mIoU(U), hIoU    argmax over the sigmoid scores; "offset": 0.1 subtracted from the scores of seen classes
Measures of a visitor of the page:
  present_accuracy                share of pixels right when only the names in the photo are given
  single_iou                      IoU of "score > 0.5" of one present class against everything else, background
                                  included, decoded with all names; mean over (photo, class); `_present`: decoded with
                                  the names in the photo; `_alone`: decoded with that one name
Numbers are shares, 0..1.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed


from ldvc.checkpoint import load_checkpoint
from ldvc.config import ModelConfig
from ldvc.data import (
    FolderDataset,
    canonical,
    canonical_set,
    load_split,
    open_sets,
)
from ldvc.errors import LdvcError
from ldvc.metrics import fit_calibration, harmonic_mean, mean_iou
from ldvc.modeling.clip import FrozenClip
from ldvc.modeling.model import LDVC
from train.tally import Tally, tally_set

logger = logging.getLogger("evaluate")


def measures(tally: Tally, seen: Sequence[bool], calibration: dict[str, float]) -> dict[str, float]:
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


def evaluate(
    source: str,
    datasets: Sequence[FolderDataset],
    *,
    arm: str | None = None,
    clip: str | FrozenClip | None = None,
    unseen: frozenset[str] | None = None,
    calibrate: bool = False,
    cache_dir: str | None = None,
    long_side: int | None = None,
    bf16: bool = True,
    alone: bool = True,
) -> dict[str, Any]:
    """Evaluates one checkpoint, or plain similarity, on some data sets.

    Args:
        source: checkpoint folder, Hub id or "lite"; with arm "clip" the towers (as `ModelConfig.clip`).
        arm: which arm, where the source holds several; "clip" needs no checkpoint.
        unseen: canonical names that count as unseen; None takes the checkpoint's list of seen names.
        calibrate: fit scale and bias on these photos and write them into the checkpoint's config.json.

    Returns:
        {"source", "arm", "calibration", "sets": {set: {measure: value, "iou": {class: value}, "seen": ..., "seconds": ...}}}.
    """
    calibration = {"scale": 1.0, "bias": 0.0}
    if arm == "clip":
        model = LDVC(ModelConfig(clip=source, pretrained=None, visual_prompts=0), clip=clip)
        metadata: dict[str, Any] = {}
    else:
        model, metadata = load_checkpoint(source, arm=arm, clip=clip)
        arm = model.config.arm
        calibration |= metadata.get("calibration") or {}
    learned = canonical_set(metadata.get("seen_names", []))
    long_side = long_side or metadata.get("inference", {}).get("long_side") or 448

    def seen(name: str) -> bool:
        return canonical(name) not in unseen if unseen is not None else canonical(name) in learned

    tallies, seconds = {}, {}
    for dataset in datasets:
        started = time.monotonic()
        tallies[dataset.name] = tally_set(
            model, arm, dataset, seen=seen, long_side=long_side, bf16=bf16, cache_dir=cache_dir, alone=alone
        )
        seconds[dataset.name] = time.monotonic() - started
        logger.info("%s %s on %s: %.2f s a photo", arm, source, dataset.name, seconds[dataset.name] / len(dataset))
    if calibrate:
        scale, bias = fit_calibration([curve for tally in tallies.values() for curve in tally.curves.values()])
        calibration = {"scale": scale, "bias": bias}
        if arm != "clip":
            write_calibration(source, arm, calibration)
    result: dict[str, Any] = {"source": str(source), "arm": arm, "calibration": calibration, "sets": {}}
    for dataset in datasets:
        tally, names = tallies[dataset.name], dataset.names()
        flags = [seen(name) for name in names]
        result["sets"][dataset.name] = measures(tally, flags, calibration) | {
            "split": dataset.split,
            "photos": len(dataset),
            "seconds": seconds[dataset.name],
            "iou": dict(zip(names, tally.joint.iou().tolist(), strict=True)),
            "unseen": [name for name, flag in zip(names, flags, strict=True) if not flag],
        }
    return result


def write_calibration(source: str, arm: str, calibration: dict[str, float], *, key: str = "calibration") -> None:
    """Puts scale and bias into a local checkpoint's config.json; `key` is "clip_calibration" for plain similarity.

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
    raise LdvcError(f"{source} is no local checkpoint folder, so its calibration cannot be written; give a folder.")


COLUMNS = {
    "pAcc": "pAcc",
    "mIoU_S": "mIoU(S)",
    "mIoU_U": "mIoU(U)",
    "hIoU": "hIoU",
    "mIoU_S_offset": "S, offset",
    "mIoU_U_offset": "U, offset",
    "hIoU_offset": "hIoU, offset",
    "present_accuracy": "acc, present names",
    "single_iou": "single IoU, all names",
    "single_iou_present": "single IoU, present names",
    "single_iou_alone": "single IoU, one name",
}


def show(value: float) -> str:
    """Three decimals, or a dash for what does not exist."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """One table per data set, one line per checkpoint."""
    lines = []
    for name in dict.fromkeys(name for result in results for name in result["sets"]):
        facts = next(result["sets"][name] for result in results if name in result["sets"])
        unseen = ", ".join(facts["unseen"]) or "none"
        lines += [f"### {name} {facts['split']}, {facts['photos']} photos; unseen: {unseen}", ""]
        lines += ["| arm | checkpoint | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
        for result in results:
            if name in result["sets"]:
                values = " | ".join(show(result["sets"][name][key]) for key in COLUMNS)
                lines.append(f"| {result['arm']} | {result['source']} | {values} |")
        lines.append("")
    return "\n".join(lines)


def for_json(value: Any) -> Any:
    """NaN has no place in JSON; it becomes null."""
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [for_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_json(path: Path, content: Any) -> None:
    """Writes a file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(for_json(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="*", default=[], help="checkpoint folders, Hub ids or 'lite'")
    parser.add_argument("--arm", help="which arm, where a checkpoint holds several")
    parser.add_argument(
        "--clip_arm", metavar="CLIP", help="also evaluate plain similarity of these towers ('lite' or a folder)"
    )
    parser.add_argument("--data", default="../shared/data", help="folder that holds the data sets")
    parser.add_argument("--sets", nargs="+", default=["msrc", "coco-mini"])
    parser.add_argument("--split", default="val")
    parser.add_argument("--unseen", help="split of unseen classes; default: what the checkpoint has not seen")
    parser.add_argument("--long_side", type=int, help="of the photo in pixels; default: what the checkpoint says")
    parser.add_argument(
        "--calibrate", action="store_true", help="fit score calibration here and write it into the checkpoint"
    )
    parser.add_argument("--cache_dir", default="runs/cache", help="where the frozen stem's outputs are kept")
    parser.add_argument("--full_precision", action="store_true", help="no bfloat16")
    parser.add_argument("--not_alone", action="store_true", help="leave out single_iou_alone")
    parser.add_argument("--output", help="writes OUTPUT.json and OUTPUT.md")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        datasets = open_sets(options.data, options.sets, options.split)
        unseen = load_split(options.unseen) if options.unseen else None
        jobs = [(options.clip_arm, "clip")] if options.clip_arm else []
        jobs += [(source, options.arm) for source in options.checkpoint]
        if not jobs:
            raise LdvcError("Nothing to evaluate: give --checkpoint or --clip_arm.")
        results = [
            evaluate(
                source,
                datasets,
                arm=arm,
                unseen=frozenset() if arm == "clip" and unseen is None else unseen,
                calibrate=options.calibrate,
                cache_dir=options.cache_dir,
                long_side=options.long_side,
                bf16=not options.full_precision,
                alone=not options.not_alone,
            )
            for source, arm in jobs
        ]
        if options.calibrate and options.clip_arm:
            for result in results[1:]:
                write_calibration(result["source"], result["arm"], results[0]["calibration"], key="clip_calibration")
    except LdvcError as error:
        sys.exit(f"error: {error}")
    table = markdown(results)
    print(table)
    if options.output:
        write_json(Path(f"{options.output}.json"), results)
        Path(f"{options.output}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
