"""Views made of several views: mosaics, and things pasted into other views."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.lite import mixing
from recipes.lite.mixing import mosaics, paste, things
from tests.tiny_data import make_sets
from train.data import BACKGROUND, VOID, Vocabulary, open_sets


def test_a_mosaic_holds_four_views_of_its_own_data_set_at_half_their_size() -> None:
    numbers = torch.arange(7)  # each view is of one colour and one label
    batch = {
        "images": numbers[:, None, None, None].expand(7, 3, 16, 16).float(),
        "labels": numbers[:, None, None].expand(7, 4, 4).short(),
        "set": torch.tensor([0, 1, 0, 0, 1, 0, 0]),
    }
    made = mosaics(batch, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(made["set"], batch["set"])
    for view, (image, label) in enumerate(zip(made["images"], made["labels"], strict=True)):
        if batch["set"][view] == 1:  # two views make no mosaic
            assert (image == view).all() and (label == view).all()
            continue
        quarters = [
            (image[:, y : y + 8, x : x + 8], label[y // 4 : y // 4 + 2, x // 4 : x // 4 + 2])
            for y in (0, 8)
            for x in (0, 8)
        ]
        shown = {int(part[0, 0, 0]) for part, _ in quarters}
        assert len(shown) == 4 and shown <= {0, 2, 3, 5, 6}
        assert all((part == part[0, 0, 0]).all() and (cells == part[0, 0, 0]).all() for part, cells in quarters)
    kept = mosaics(batch, 0.0, torch.Generator())
    assert torch.equal(kept["images"], batch["images"]) and torch.equal(kept["labels"], batch["labels"])


def test_things_are_what_data_sets_with_a_background_label(tmp_path: Path) -> None:
    datasets = open_sets(make_sets(tmp_path), ["meadow", "pets"], "train")
    vocabulary = Vocabulary(datasets)
    found = dict(zip(vocabulary.names, things(datasets, vocabulary).tolist(), strict=True))
    assert found == {"grass": False, "sky": False, "airplane": False, "dog": True, "cat": True}


CUP, DOG, GRASS = 0, 1, 2
KNOWN = torch.tensor([[True, True, False], [False, True, False]])  # the second data set knows grass, too, but as stuff


def views() -> dict[str, Tensor]:
    """Five views of 64 x 64 pixels, each of one grey; what they show is brighter, in the middle, and tall on the left alone."""
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 64, 64).clone()
    labels = torch.full((5, 16, 16), BACKGROUND, dtype=torch.int16)
    for view, name in ((0, CUP), (1, DOG), (3, DOG)):
        for rows, columns in ((slice(4, 12), slice(2, 6)), (slice(9, 12), slice(6, 14))):
            labels[view, rows, columns] = name
            images[view, :, 4 * rows.start : 4 * rows.stop, 4 * columns.start : 4 * columns.stop] += 10
    labels[3, 0] = VOID
    labels[4] = GRASS
    return {"images": images, "labels": labels, "set": torch.tensor([0, 0, 0, 1, 1])}


@pytest.mark.parametrize("seed", range(8))
def test_a_pasted_thing_brings_its_pixels_and_its_label(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "PASTED", 1)
    monkeypatch.setattr(mixing, "SHRINK", (0.5, 0.9))
    batch = views()
    before = {name: value.clone() for name, value in batch.items()}
    made = paste(batch, 1.0, KNOWN, torch.Generator().manual_seed(seed))
    assert all(torch.equal(batch[name], value) for name, value in before.items()), "the batch itself stays"
    for view in range(5):
        image, labels, old = made["images"][view], made["labels"][view], batch["labels"][view]
        rows, columns = (labels != old).nonzero(as_tuple=True)
        if len(rows) == 0:  # it came upon what has the same label, at most
            assert view in (0, 1, 3)
            continue
        (name,) = labels[rows, columns].unique().tolist()
        assert KNOWN[batch["set"][view], name], "views of the second data set get no cups"
        assert (view, name) != (0, CUP), "nothing comes from the view itself, and no other shows a cup"
        sources = {CUP: (10,), DOG: (11, 13)}[name]
        sources = [source for source in sources if source != view + 10]
        seen = image[0, rows * 4 + 2, columns * 4 + 2]  # the middle of each cell; at the border it fades
        near = torch.stack([(seen - source).abs() < 0.5 * abs(source - view) for source in sources]).any(dim=0)
        assert near.float().mean() > 0.75, "nearly all, for those at the border were partly something else before"
        assert any(abs(float(seen.max()) - source) < 0.5 for source in sources), "of another view, not of this one"
        assert int(rows.max() - rows.min()) < 8 and int(columns.max() - columns.min()) < 12, "no larger than it was"
        unchanged = labels == old
        assert (image[:, unchanged.repeat_interleave(4, 0).repeat_interleave(4, 1)] <= 14).all()


def test_where_nothing_can_be_pasted_nothing_is() -> None:
    batch = views()
    for known, share in ((torch.zeros_like(KNOWN), 1.0), (KNOWN, 0.0)):
        made = paste(batch, share, known, torch.Generator())
        assert all(torch.equal(made[name], batch[name]) for name in batch)
    alone = {name: value[:1] for name, value in batch.items()}
    assert torch.equal(paste(alone, 1.0, KNOWN, torch.Generator())["labels"], alone["labels"])


def test_rare_things_are_pasted_as_often_as_common_ones() -> None:
    """Among thirty dogs the one cup is half of what is pasted."""
    batch = views()
    order = torch.tensor([0] + [1] * 30 + [2] * 30)
    batch = {name: value[order] for name, value in batch.items()}
    made = paste(batch, 1.0, KNOWN, torch.Generator().manual_seed(0))
    changed = made["labels"] != batch["labels"]
    shown = [made["labels"][view][changed[view]].unique().tolist() for view in range(31, 61)]
    cups, dogs = (sum(name in names for names in shown) for name in (CUP, DOG))
    assert min(cups, dogs) > 12
