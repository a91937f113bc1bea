"""Masks of stuff: which photos and pixels get a word."""

from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.lite.steps import VOID
from recipes.lite.stuff_masks import MARGIN, STUFF, WORDS, captioned, leaders, surroundings

GRASS, WATER = list(STUFF).index("grass"), list(STUFF).index("water")


def test_captions_decide_which_words_a_photo_may_show(tmp_path: Path) -> None:
    rows = {  # one caption that mentions grass is enough, water needs two
        "lawn.jpg": "A dog runs on grass. || A brown dog.",
        "pond.jpg": "A duck in a pond. || A duck near the water. || A bird.",
        "one.jpg": "A man with a glass of water. || A man drinks.",
        "none.jpg": "",
    }
    folder = tmp_path / "clip" / "images"
    folder.mkdir(parents=True)
    (tmp_path / "teacher").mkdir()
    cells = np.zeros((2, 4, 4), dtype=bool)
    cells[0, :, :2], cells[1, 3, 3] = True, True  # a thing on the left, an uncertain one in the corner
    masks, confidences = np.packbits(cells.reshape(2, 16), axis=1), np.array([0.9, 0.2])
    for file in rows:
        Image.new("RGB", (8, 8)).save(folder / file)
        np.savez(tmp_path / "teacher" / f"{Path(file).stem}.npz", masks=masks, confidences=confidences, shape=(4, 4))
    lines = ["file,captions", *(f'{file},"{captions}"' for file, captions in rows.items())]
    (tmp_path / "clip" / "labels.csv").write_text("\n".join(lines), encoding="utf-8")

    photos = {photo.file.stem: photo for photo in captioned(Namespace(data=tmp_path, work=tmp_path))}
    assert photos.keys() == {"lawn", "pond"}
    assert np.flatnonzero(photos["lawn"].mentioned).tolist() == [GRASS]
    assert np.flatnonzero(photos["pond"].mentioned).tolist() == [WATER]
    thing, void = photos["lawn"].thing, photos["lawn"].void
    assert thing[:, :4].all() and not thing[:, 4:].any()
    assert void[7, 7] and not (void & thing).any() and not void[0].any()
    assert surroundings(photos["lawn"], np.zeros((len(WORDS), 4, 4), dtype=np.float32)).shape == (len(WORDS), 8 - 1)


def test_a_word_gets_the_pixels_where_it_leads_all_others() -> None:
    scores = np.zeros((len(WORDS), 10, 10))
    scores[GRASS, :5] = 2 * MARGIN  # grass leads in the upper half,
    scores[-1, 0] = 1.5 * MARGIN  # in the first row by half a margin only,
    scores[WATER, 9] = 2 * MARGIN  # water in the last row
    margin = np.subtract(*np.sort(scores, axis=0)[:-3:-1])
    free = np.ones((10, 10), dtype=bool)
    free[4] = False
    mask = leaders(scores, margin, np.array([GRASS]), free)
    assert (mask[1:4] == 1 + GRASS).all()
    assert (np.delete(mask, slice(1, 4), axis=0) == VOID).all()  # water may not be shown
    free[1:4, 1:] = free[2:4] = False
    assert (leaders(scores, margin, np.array([GRASS]), free) == VOID).all()  # one pixel is too little
    assert (leaders(scores, margin, np.array([WATER]), free)[9] == 1 + WATER).all()
