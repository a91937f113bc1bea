"""Reading, merging, augmenting and sampling; photos that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from ldvc.errors import DataError
from tests.full_disk import full_disk
from tests.tiny_data import make_sets, make_voc, names_in
from train import data
from train.processes import message_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_sets(tmp_path / "data")


def test_vocabulary_merges_names_and_holds_out(root: Path) -> None:
    datasets = data.open_sets(root, ["meadow", "pets"], "train")
    vocabulary = data.Vocabulary(datasets, held_out=frozenset({"cat"}))
    assert vocabulary.names == ["grass", "sky", "airplane", "dog"]
    assert {"aeroplane", "airplane"} <= set(vocabulary.spellings) and "cat" not in vocabulary.spellings
    assert vocabulary.annotated.tolist() == [[True] * 4, [False, False, False, True]]
    meadow, pets = vocabulary.tables
    assert meadow[:4].tolist() == [0, 1, 2, 3] and meadow[255] == data.VOID
    assert pets[:3].tolist() == [data.BACKGROUND, 3, data.VOID]  # dog is shared, the held-out cat is void
    assert vocabulary.present(torch.tensor([[0, data.VOID], [data.BACKGROUND, 3]])).tolist() == [True, False, False, True]
    negative = data.Vocabulary(datasets, held_out=frozenset({"cat"}), held_out_as_background=True)
    assert negative.tables[1][[0, 1, 2, 255]].tolist() == [data.BACKGROUND, 3, data.BACKGROUND, data.VOID]


def test_a_view_without_chance_is_the_photo() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    mask = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    options = {"crop": 32, "long_side": 32, "short_side": None, "scale": (1.0, 1.0), "photometric": 0.0}
    still, mirrored = data.Augmentation(flip=0.0, **options), data.Augmentation(flip=1.0, stride=4, **options)
    view, labels = data.random_view(Image.fromarray(pixels), mask, still, np.random.default_rng(0))
    np.testing.assert_array_equal(view, pixels)
    np.testing.assert_array_equal(labels, mask)
    view, labels = data.random_view(Image.fromarray(pixels), mask, mirrored, np.random.default_rng(0))
    np.testing.assert_array_equal(view, pixels[:, ::-1])
    np.testing.assert_array_equal(labels, mask[2::4, 2::4][:, ::-1])


@pytest.mark.parametrize("scale", [(0.4, 0.6), (0.5, 2.0), (2.5, 3.0)])
@pytest.mark.parametrize("size", [(50, 90), (90, 50)])
def test_photo_and_mask_stay_together(scale: tuple[float, float], size: tuple[int, int]) -> None:
    # each class has its own colour, so the colour under a label must be the class's, up to the border between areas
    mask = np.zeros(size, dtype=np.uint8)
    mask[20:, 30:] = 1
    colours = np.array([[250, 10, 10], [10, 10, 250]], dtype=np.uint8)
    sizes = {"crop": 64, "long_side": 80, "short_side": None, "scale": scale, "aspect": 1.3, "stride": 4}
    augmentation = data.Augmentation(photometric=0.0, **sizes)
    for seed in range(12):
        view, labels = data.random_view(Image.fromarray(colours[mask]), mask, augmentation, np.random.default_rng(seed))
        assert view.shape == (64, 64, 3) and labels.shape == (16, 16)
        # the centre of a cell lies between four pixels; one of them shows the class, except on a blurred border
        corners = np.stack([view[y::4, x::4] for y in (1, 2) for x in (1, 2)]).astype(int)  # (4, 16, 16, 3)
        inside = labels != 255
        distance = np.abs(corners[:, inside] - colours[labels[inside]].astype(int)).sum(axis=-1).min(axis=0)
        assert inside.any() and (distance < 60).mean() > 0.8
        grey = np.abs(corners[:, ~inside] - 127).sum(axis=-1).min(axis=0)
        assert (grey == 0).all()


def test_schedule_is_a_function_of_the_sample_index() -> None:
    schedule, later = (data.SampleSchedule([5, 3], [0.75, 0.25], seed=1) for _ in range(2))
    samples = [schedule[number] for number in range(9000)]
    assert [later[number] for number in (8500, 17, 4100)] == [samples[8500], samples[17], samples[4100]]
    share = np.mean([index == 0 for index, _, _ in samples])
    assert 0.72 < share < 0.78
    first = [photo for index, photo, epoch in samples if index == 0 and epoch == 4]
    assert sorted(first) == [0, 1, 2, 3, 4]  # every epoch has every photo once
    assert [data.SampleSchedule([5, 3], [1, 1], seed=2)[number] for number in range(20)] != samples[:20]


@pytest.mark.parametrize("limit", [0, 1, 9])
def test_names_of_a_step(limit: int) -> None:
    present = torch.isin(torch.arange(40), torch.tensor([3, 7]))
    options = {"distilled": 6, "full_probability": 0.5, "seed": 0}
    sampler, unlimited = data.NameSampler(40, 100, limit=limit, **options), data.NameSampler(40, 100, **options)
    others = []
    for step in range(60):
        names, distilled = sampler.sample(step, present)
        all_names, all_distilled = unlimited.sample(step, present)
        assert {3, 7} <= set(names.tolist()) <= set(all_names.tolist())
        assert torch.equal(distilled, all_distilled) and len(set(distilled.tolist())) == 6 and distilled.max() < 100
        others.append(len(names) - 2)
    if limit:
        assert max(others) == limit and min(others) < limit
        assert len({name for step in range(600) for name in sampler.sample(step, present)[0].tolist()}) == 40
    else:
        assert 15 < others.count(38) < 45 and min(others) < 10
    again = data.NameSampler(40, 100, limit=limit, **options).sample(17, present)
    assert all(torch.equal(one, other) for one, other in zip(again, sampler.sample(17, present), strict=True))
    names, distilled = data.NameSampler(40, 0, distilled=6, full_probability=1.0, seed=0).sample(0, present)
    assert len(names) == 40 and len(distilled) == 0


def test_held_out_names_of_self_training_are_beyond_the_limit() -> None:
    unseen = torch.arange(40) >= 30
    options = {"distilled": 0, "full_probability": 1.0, "seed": 0, "limit": 4}
    sampler = data.NameSampler(40, 0, unseen=unseen, self_training_from=5, **options)
    present = torch.zeros(40, dtype=torch.bool)
    before, after = (set(sampler.sample(step, present)[0].tolist()) for step in (4, 5))
    assert len(before) <= 4 and not before & set(range(30, 40)) and after >= set(range(30, 40))
    assert len(after) <= 4 + 10


STATISTICS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def _stand_in_encoder(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stem = torch.nn.functional.avg_pool2d(images, 16)  # (B, 3, h, w)
    return stem, stem.flatten(2).transpose(1, 2)


def _cache(folder: Path, dataset: data.SegmentationDataset, towers: str = "abc", **choices: object) -> data.ViewCache:
    augmentation = data.Augmentation(crop=32, long_side=48, short_side=None, stride=4, **choices)
    options = {"views": 2, "seed": 0, "towers": towers, "token_shape": (3, 2, 2), "feature_shape": (4, 3)}
    return data.ViewCache(folder, dataset, augmentation=augmentation, **options)


def test_cached_views_resume_and_equal_fresh_ones(root: Path, tmp_path: Path) -> None:
    datasets, calls = data.open_sets(root, ["meadow", "pets"], "train"), []

    def caches_of(towers: str) -> list[data.ViewCache]:
        return [_cache(tmp_path / "cache", dataset, towers) for dataset in datasets]

    def interrupted(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return _stand_in_encoder(images)

    caches = caches_of("abc")
    with pytest.raises(KeyboardInterrupt):
        caches[0].build(interrupted, batch=4, **STATISTICS)
    assert caches[0].done == 4
    data.build_caches(caches, _stand_in_encoder, **STATISTICS)
    again = caches_of("abc")
    assert [cache.done for cache in again] == [12, 12] and again[0].build(interrupted, **STATISTICS)
    assert caches_of("other")[0].done == 0
    assert torch.equal(again[0].patch_tokens, caches[0].patch_tokens) and again[0].patch_tokens.abs().sum() > 0

    schedule, vocabulary = data.SampleSchedule([6, 6], [1, 1], seed=0), data.Vocabulary(datasets)
    options = {"augmentation": caches[0].augmentation, "seed": 0, **STATISTICS}
    fresh = data.TrainingViews(datasets, vocabulary, schedule, samples=40, **options)
    stored = replace(fresh, caches=again)
    assert stored[5]["patch_tokens"].shape == (3, 2, 2) and stored[5]["features"].shape == (4, 3)
    assert fresh[5]["images"].shape == (3, 32, 32) and stored[5]["set"] == fresh[5]["set"]
    assert stored[5]["labels"].shape == fresh[5]["labels"].shape == (8, 8) and stored[5]["labels"].dtype == torch.int16
    for number in range(40):  # some turns through both sets, and all stored views
        place, photo, count = schedule[number]
        pair, generator = datasets[place].pair(photo), np.random.default_rng((0, photo, count % 2))
        _, labels = data.random_view(*pair, caches[0].augmentation, generator, void=datasets[place].ignore_index)
        assert torch.equal(stored[number]["labels"], torch.from_numpy(vocabulary.tables[place][labels]))


def test_stored_views_that_do_not_fit_the_disk_are_a_sentence(root: Path, tmp_path: Path) -> None:
    dataset = data.open_set(root, "pets", "train")
    with full_disk(200), pytest.raises(DataError, match=r"bf16 of 0 MB cannot be written .* give another --cache_dir"):
        _cache(tmp_path / "cache", dataset)


def test_a_cache_belongs_to_its_photos_masks_and_choices(root: Path, tmp_path: Path) -> None:
    def folder(**choices: float) -> str:
        return _cache(tmp_path, data.open_set(root, "pets", "train"), **choices).folder.name

    choices = [{}, {}, {"uniform_scale": True}, {"hue": 36.0}, {"largest_class": 0.75}, {"aspect": 1.1}]
    assert len({folder(**each) for each in choices}) == 5
    for kind, suffix in (("masks", "png"), ("images", "jpg")):
        file = root / "pets" / kind / f"photo2.{suffix}"
        before = folder()
        Image.open(file).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(file)
        assert folder() != before, f"corrected {kind} are not those of the cache"


@pytest.fixture
def voc(tmp_path: Path) -> data.SegmentationDataset:
    make_voc(tmp_path)
    return data.open_set(tmp_path, "voc2012", "train")


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no photo": (lambda photo, mask: photo.unlink(), "no such file"),
    "no mask": (lambda photo, mask: mask.unlink(), "no such file"),
    "truncated photo": (lambda photo, mask: photo.write_bytes(photo.read_bytes()[:-300]), "truncated"),
    "truncated mask": (lambda photo, mask: mask.write_bytes(mask.read_bytes()[:-30]), "cannot be read"),
    "no picture": (lambda photo, mask: photo.write_text("hello"), "cannot identify"),
    "empty mask": (lambda photo, mask: mask.write_bytes(b""), "cannot identify"),
    "another size": (lambda photo, mask: Image.open(mask).resize((30, 20), 0).save(mask), "72 x 48 .* 30 x 20"),
    "no class": (lambda photo, mask: Image.fromarray(np.full((48, 72), 200, np.uint8)).save(mask), "index 200"),
}


def test_any_exception_of_pillow_is_one_sentence(voc: data.SegmentationDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its readers raise a dozen kinds for damaged files."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=AttributeError("odd")))
    with pytest.raises(DataError, match="The photo .* cannot be read: odd"):
        voc.pair(0)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(voc: data.SegmentationDataset, damage: str) -> None:
    spoil, words = DAMAGE[damage]
    spoil(voc.photo_path(voc.stems[2]), voc.mask_path(voc.stems[2]))
    with pytest.raises(DataError, match=words) as caught:
        voc.pair(2)
    assert "2007_000039" in str(caught.value) and "\n" not in str(caught.value)
    voc.pair(1)


def _views(dataset: data.SegmentationDataset, samples: int, **skipped: data.SkippedPhotos) -> data.TrainingViews:
    schedule = data.SampleSchedule([len(dataset)], [1.0], seed=3)
    options = {"augmentation": data.Augmentation(crop=32, short_side=40), "seed": 3, **STATISTICS}
    return data.TrainingViews([dataset], data.Vocabulary([dataset]), schedule, samples=samples, **options, **skipped)


def test_what_cannot_be_used_is_replaced_counted_and_listed(voc: data.SegmentationDataset, tmp_path: Path) -> None:
    whole = [_views(voc, 12)[index] for index in range(12)]
    voc.photo_path("2007_000039").write_text("spoilt")  # number 2; 3 takes its place
    voc.mask_path("2007_000032").unlink()  # number 0; 1 takes its place
    skipped, instead = data.SkippedPhotos(tmp_path / "run" / "skipped.txt"), {0: 1, 2: 3}
    views = _views(voc, 12, skipped=skipped)
    found = list(torch.utils.data.DataLoader(views, batch_size=None, num_workers=2))  # which share one list
    for index, (old, new) in enumerate(zip(whole, found, strict=True)):
        photo = views.schedule[index][1]
        assert torch.equal(old["images"], new["images"]) == (photo not in instead), index
        names = {views.vocabulary.texts[index] for index in new["labels"].unique().tolist() if index >= 0}
        assert names <= {"-", *names_in(voc, instead.get(photo, photo))}
    # a resumed run samples the same and lists nothing twice
    again = _views(voc, 12, skipped=data.SkippedPhotos(skipped.file))
    assert all(torch.equal(again[index]["images"], found[index]["images"]) for index in (11, 5, 8, 0, 1, 2, 3))
    lines = skipped.file.read_text().splitlines()
    assert sorted(line.split("\t")[1] for line in lines) == ["2007_000032", "2007_000039"]
    assert skipped.summary() == f"skipped photos that cannot be used: 2 of voc2012; listed in {skipped.file}"
    skipped.forget()
    assert skipped.summary() == ""


def test_the_message_of_a_workers_error_has_no_stack_trace(voc: data.SegmentationDataset) -> None:
    for photo in map(voc.photo_path, voc.stems):
        photo.write_bytes(b"no photo")
    with pytest.raises(DataError) as caught:
        next(iter(torch.utils.data.DataLoader(_views(voc, 2), num_workers=1)))
    assert "Traceback" in str(caught.value)  # PyTorch puts it there
    message = message_of(caught.value)
    assert message.startswith("None of the 4 photos of voc2012 can be used.") and "\n" not in message
    assert message_of(DataError("Caught cold: stay in bed.")) == "Caught cold: stay in bed."


def test_stored_views_remember_what_was_skipped(voc: data.SegmentationDataset, tmp_path: Path) -> None:
    voc.photo_path("2007_000039").write_text("spoilt")

    assert _cache(tmp_path / "cache", voc).build(_stand_in_encoder, **STATISTICS)
    of_run = data.SkippedPhotos(tmp_path / "run" / "skipped.txt")
    of_run.merge(_cache(tmp_path / "cache", voc).skipped.found())  # a later run reads the stored views only
    assert "1 of voc2012" in of_run.summary() and "2007_000039" in of_run.file.read_text()
