"""Photos and masks that cannot be used: one sentence, another photo in their place, and a list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from ldvc.errors import DataError
from tests.tiny_data import make_set, make_voc, names_in
from train.data import (
    Augmentation,
    SampleSchedule,
    SegmentationDataset,
    SkippedPhotos,
    TrainingViews,
    ViewCache,
    Vocabulary,
    open_set,
)
from train.processes import message_of

DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no photo": (lambda photo, mask: photo.unlink(), "no such file"),
    "no mask": (lambda photo, mask: mask.unlink(), "no such file"),
    "truncated photo": (lambda photo, mask: photo.write_bytes(photo.read_bytes()[:-300]), "truncated"),
    "truncated mask": (lambda photo, mask: mask.write_bytes(mask.read_bytes()[:-30]), "cannot be read"),
    "no picture": (lambda photo, mask: photo.write_text("hello"), "cannot identify"),
    "empty mask": (lambda photo, mask: mask.write_bytes(b""), "cannot identify"),
    "another size": (lambda photo, mask: Image.open(mask).resize((30, 20), 0).save(mask), "72 x 48 .* 30 x 20"),
    "no class": (lambda photo, mask: Image.fromarray(np.full((48, 72), 200, np.uint8)).save(mask), "index 200"),
    "colours": (lambda photo, mask: Image.new("RGB", (72, 48), "red").save(mask), "picture with colours; save"),
    "16 bits": (lambda photo, mask: Image.fromarray(np.full((48, 72), 300, np.uint16)).save(mask), "index 300"),
}


def test_any_exception_of_pillow_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its readers raise a dozen kinds for damaged files."""
    make_set(tmp_path / "mine", ["sky", "grass"])
    dataset = open_set(tmp_path, "mine", "train")

    def fail(*_) -> None:
        raise AttributeError("odd")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(DataError, match="The photo .* cannot be read: odd"):
        dataset.pair(0)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(tmp_path: Path, damage: str) -> None:
    make_voc(tmp_path)
    dataset = open_set(tmp_path, "voc2012", "train")
    spoil, words = DAMAGE[damage]
    spoil(dataset.photo_path(dataset.stems[2]), dataset.mask_path(dataset.stems[2]))
    with pytest.raises(DataError, match=words) as caught:
        dataset.pair(2)
    assert "2007_000039" in str(caught.value) and "\n" not in str(caught.value)
    dataset.pair(1)


def _views(dataset: SegmentationDataset, samples: int, skipped: SkippedPhotos | None = None) -> TrainingViews:
    return TrainingViews(
        [dataset],
        Vocabulary([dataset]),
        SampleSchedule([len(dataset)], [1.0], seed=3),
        samples=samples,
        augmentation=Augmentation(crop=32, short_side=40),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        seed=3,
        skipped=skipped,
    )


def test_what_cannot_be_used_is_replaced_counted_and_listed(tmp_path: Path) -> None:
    make_voc(tmp_path)
    dataset = open_set(tmp_path, "voc2012", "train")
    whole = [_views(dataset, 12)[index] for index in range(12)]
    dataset.photo_path("2007_000039").write_text("spoilt")  # number 2; 3 takes its place
    dataset.mask_path("2007_000032").unlink()  # number 0; 1 takes its place
    skipped = SkippedPhotos(tmp_path / "run" / "skipped.txt")
    views = _views(dataset, 12, skipped)
    found = [views[index] for index in range(12)]
    schedule = SampleSchedule([4], [1.0], seed=3)
    instead = {0: 1, 2: 3}
    for index, (old, new) in enumerate(zip(whole, found, strict=True)):
        photo = schedule[index][1]
        same = torch.equal(old["images"], new["images"])
        assert same == (photo not in instead), index  # readable photos are not affected
        names = {views.vocabulary.texts[index] for index in new["labels"].unique().tolist() if index >= 0}
        allowed = {"-", *names_in(dataset, instead.get(photo, photo))}
        assert names <= allowed
    # the continuation of a run, in another process, samples the same and lists nothing twice
    again = _views(dataset, 12, SkippedPhotos(tmp_path / "run" / "skipped.txt"))
    assert all(torch.equal(again[index]["images"], found[index]["images"]) for index in (11, 5, 8, 0, 1, 2, 3))
    lines = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert sorted(line.split("\t")[1] for line in lines) == ["2007_000032", "2007_000039"] and len(skipped) == 2
    assert skipped.summary() == (
        f"skipped photos that cannot be used: 2 of voc2012; listed in {tmp_path / 'run' / 'skipped.txt'}"
    )
    skipped.forget()
    assert not skipped and skipped.summary() == ""


def test_loader_workers_share_one_list(tmp_path: Path) -> None:
    make_voc(tmp_path)
    dataset = open_set(tmp_path, "voc2012", "train")
    dataset.photo_path("2007_000039").write_text("spoilt")
    skipped = SkippedPhotos(tmp_path / "skipped.txt")
    alone = [_views(dataset, 8)[index]["images"] for index in range(8)]
    loader = torch.utils.data.DataLoader(_views(dataset, 8, skipped), batch_size=2, num_workers=2)
    batches = torch.cat([batch["images"] for batch in loader])
    assert torch.equal(batches, torch.stack(alone))
    assert len(skipped) == 1 and "2007_000039" in skipped.file.read_text()


def test_when_nothing_can_be_read_the_run_ends_with_a_sentence(tmp_path: Path) -> None:
    make_voc(tmp_path)
    dataset = open_set(tmp_path, "voc2012", "train")
    for stem in dataset.stems:
        dataset.photo_path(stem).write_text("spoilt")
    with pytest.raises(DataError, match="None of the 4 photos of voc2012 can be used.* 4 of voc2012; the first: The photo"):
        _views(dataset, 4)[0]


def test_the_message_of_a_workers_error_has_no_stack_trace(tmp_path: Path) -> None:
    dataset = open_set(tmp_path, make_set(tmp_path / "meadow", ["grass", "sky"]).name, "train")
    for photo in (tmp_path / "meadow" / "images").iterdir():
        photo.write_bytes(b"no photo")
    loader = torch.utils.data.DataLoader(_views(dataset, 2, SkippedPhotos(tmp_path / "skipped.txt")), num_workers=1)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert "Traceback" in str(caught.value)  # PyTorch puts it there
    message = message_of(caught.value)
    assert message.startswith("None of the 6 photos of meadow can be used.") and "\n" not in message
    assert message_of(DataError("Caught cold: stay in bed.")) == "Caught cold: stay in bed."


def test_stored_views_remember_what_was_skipped(tmp_path: Path) -> None:
    make_voc(tmp_path)
    dataset = open_set(tmp_path, "voc2012", "train")
    dataset.photo_path("2007_000039").write_text("spoilt")

    def cache() -> ViewCache:
        options = {"augmentation": Augmentation(crop=32, short_side=40, stride=4), "views": 2, "seed": 0, "towers": "x"}
        return ViewCache(tmp_path / "cache", dataset, token_shape=(3, 2, 2), feature_shape=(4, 3), **options)

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stem = torch.nn.functional.avg_pool2d(images, 16)
        return stem, stem.flatten(2).transpose(1, 2)

    assert cache().build(encode, mean=(0.5,) * 3, std=(0.5,) * 3)
    of_run = SkippedPhotos(tmp_path / "run" / "skipped.txt")
    of_run.merge(cache().skipped)  # a later run reads the stored views only
    assert "1 of voc2012" in of_run.summary() and "2007_000039" in of_run.file.read_text()
