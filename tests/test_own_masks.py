"""Data sets as people have them: kinds of mask files, numberings, lists, and what is refused before the first step."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldvc.checkpoint import load_checkpoint
from ldvc.errors import DataError, LdvcError
from tests.forked import Configure
from tests.tiny_data import make_set, make_voc, names_in
from tools.fuzz_pictures import png_chunk
from train.data import SegmentationDataset, Vocabulary, inspect_masks, open_set
from train.evaluate import main as evaluate_main
from train.train import main, train

NUMBERS = np.array([[0, 1, 2, 3, 1, 0], [3, 2, 1, 0, 0, 2]], dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
CLASSES = ["grass", "sky", "dog", "cat"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A plain folder with four classes."""
    return make_set(tmp_path / "mine", CLASSES, size=NUMBERS.shape)


def opened(folder: Path, **changes: object) -> SegmentationDataset:
    """The data set, with changes of its dataset.json."""
    file = folder / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return open_set(folder.parent, folder.name, "train")


def write_masks(folder: Path, *masks: np.ndarray | list) -> None:
    """Other masks for the photos of a folder: rows of columns."""
    for number, path in enumerate(sorted((folder / "masks").iterdir())):
        values = np.array(masks[number % len(masks)], dtype=np.uint8)
        Image.fromarray(np.resize(np.repeat(values, 12), NUMBERS.shape)).save(path)


# ---- kinds of files (C2)


def write_png(path: Path, rows: list[bytes], bits: int, colour: int) -> None:
    """A PNG of a kind that Pillow does not write: `bits` for each channel; colour 0 = grey, 2 = RGB."""
    header = struct.pack(">IIBBBBB", NUMBERS.shape[1], NUMBERS.shape[0], bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def write_deep_rgb_png(path: Path) -> None:
    """48 bits a pixel with equal small numbers, of which Pillow keeps the high bytes: zeros."""
    write_png(path, [row.astype(">u2").repeat(3).tobytes() for row in NUMBERS], 16, 2)


def bands(*channels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack(channels, axis=-1))


def write_tiff(picture: Image.Image) -> Callable[[Path], None]:
    return lambda path: picture.save(path, format="TIFF")


FULL, WIDE = np.full_like(NUMBERS, 255), NUMBERS.astype(np.int32)
READ = {
    "RGB with equal channels": bands(NUMBERS, NUMBERS, NUMBERS),
    "RGBA with equal channels": bands(NUMBERS, NUMBERS, NUMBERS, FULL),
    "grey and alpha": bands(NUMBERS, FULL),
    "16 bits": Image.fromarray(NUMBERS.astype(np.uint16)),
    "32 bits": Image.fromarray(WIDE),
}


@pytest.mark.parametrize("kind", READ)
def test_numbers_in_any_picture_are_read(own: Path, kind: str) -> None:
    READ[kind].save(own / "masks" / "photo0.png")
    np.testing.assert_array_equal(opened(own).mask(0), NUMBERS)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_pictures_with_few_bits(own: Path, bits: int) -> None:
    numbers = NUMBERS & 1 if bits == 1 else NUMBERS
    rows = np.unpackbits(numbers[..., None], axis=2)[..., -bits:].reshape(len(numbers), -1)
    write_png(own / "masks" / "photo0.png", [np.packbits(row).tobytes() for row in rows], bits, 0)
    np.testing.assert_array_equal(opened(own).mask(0), numbers)


REFUSED = {
    "colours": (lambda path: bands(NUMBERS, FULL, NUMBERS).save(path), "a picture with colours; save the class numbers"),
    "colours and alpha": (lambda path: bands(NUMBERS, FULL, NUMBERS, FULL).save(path), "a picture with colours"),
    "holes": (lambda path: bands(NUMBERS, NUMBERS * 60).save(path), "transparent; save the class numbers"),
    "48 bits": (write_deep_rgb_png, "16 bits per channel"),
    "large numbers": (write_tiff(Image.fromarray(WIDE * 256)), "index 256"),
    "negative numbers": (write_tiff(Image.fromarray(WIDE - 1)), "index -1"),
    "fractions": (write_tiff(Image.fromarray(NUMBERS.astype(np.float32))), "fractions"),
    "CMYK": (write_tiff(bands(NUMBERS, NUMBERS, NUMBERS).convert("CMYK")), "colours"),
}


@pytest.mark.parametrize(("write", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_ambiguous_is_refused_in_plain_words(own: Path, write: Callable[[Path], None], words: str) -> None:
    write(own / "masks" / "photo0.png")
    dataset = opened(own)
    with pytest.raises(DataError, match=words) as caught:
        dataset.mask(0)
    assert str(own / "masks" / "photo0.png") in str(caught.value) and "mode" not in str(caught.value)
    (note,) = inspect_masks([dataset])
    skipped = "photos of mine with the numbers" if "index" in words else "1 of 6 photos of mine cannot be used; the first: "
    assert note.startswith(skipped)


def test_the_usable_mask_of_a_photo_is_preferred(tmp_path: Path) -> None:
    """C5: colours in SegmentationClass, numbers in SegmentationClassAug."""
    kit = make_voc(tmp_path)
    official, other = (kit / part / "2007_000032.png" for part in ("SegmentationClass", "SegmentationClassAug"))
    Image.open(official).save(other)
    for spoil in (lambda: Image.open(official).convert("RGB").save(official), lambda: official.write_bytes(b"")):
        spoil()
        assert names_in(open_set(tmp_path, "voc2012", "train"), 0) == ["-", "aeroplane", "-", "person"]


def test_a_photo_that_exif_turned_is_explained(own: Path) -> None:
    """C4: before the first step, too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (own / "images").iterdir():
        Image.open(path).save(path, exif=exif)
    dataset = opened(own)
    words = "16 x 48 pixels?|has 16 x 48 pixels, but its mask has 48 x 16: its EXIF orientation 6 turned the photo"
    with pytest.raises(DataError, match=words):
        dataset.pair(0)
    with pytest.raises(DataError, match="None of the 6 photos of mine can be used.*EXIF orientation 6 turned the photo"):
        inspect_masks([dataset])


# ---- lists (C3)


@pytest.mark.parametrize(
    ("line", "stem"),
    [
        ("images/my photo.jpg", "my photo"), ("my photo", "my photo"), ("images\\photo1.jpg", "photo1"),
        ("./images/my photo.jpg masks/my photo.png", "my photo"), ("photo1.JPG", "photo1"), ("photo1 1", "photo1"),
        ('"images/my photo.jpg","masks/my photo.png"', "my photo"), ("photo1\tphoto1.png", "photo1"),
        ("photo1.jpg, photo1.png", "photo1"), ("photo1;photo1", "photo1"), ("#7", "#7"), ("IMG 1.2", "IMG 1.2"),
        ("/data/mine/images/photo1.jpg /data/mine/masks/photo1.png", "photo1"), ("CAPITAL", "CAPITAL"), ("drawn.webp", "drawn"),
    ],
)  # fmt: skip
def test_list_lines_of_every_habit(own: Path, line: str, stem: str) -> None:
    for name in ("my photo.jpg", "#7.jpg", "IMG 1.2.jpg", "CAPITAL.JPG", "drawn.webp"):
        Image.open(own / "images" / "photo1.jpg").save(own / "images" / name)
        suffix = ".PNG" if name.startswith("CAPITAL") else ".png"
        Image.open(own / "masks" / "photo1.png").save((own / "masks" / name).with_suffix(suffix))
    text = f"\ufeff# a comment\r\n\r\n{line}\r\n  \r\nphoto0\r\n"
    (own / "train.txt").write_bytes(text.encode())
    dataset = opened(own)
    assert dataset.stems == [stem, "photo0"]
    dataset.pair(0)


def test_two_photos_of_one_name_are_refused(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as masks that lie beside the photos. One that is listed twice is noted."""
    (own / "train.txt").write_text("photo0\nphoto1\nphoto0\n")
    with caplog.at_level("WARNING"):
        assert len(opened(own)) == 3 and "names 1 photos more than once" in caplog.text
    Image.open(own / "masks" / "photo1.png").save(own / "images" / "photo1.png")
    with pytest.raises(DataError, match="photo1.jpg and photo1.png have one name apart from the suffix"):
        opened(own)
    (own / "train.txt").write_text("photo0\n")
    assert len(opened(own)) == 1  # the list does not name it


# ---- numbers and names (C1)


def test_binary_masks_are_refused_with_what_255_means(own: Path) -> None:
    for mask, classes, background, words in (
        ([0, 255], ["background", "dog"], 0, "0, 255 occur .* 1 is 'dog', and 255 is void.* No mask shows dog"),
        ([0, 255], ["dog"], None, "one class and nothing else.* 0 is 'dog', and 255 is void.*\"background_index\": 0"),
        ([255, 255], CLASSES, None, "shows a class.* 255 occur .*No mask shows grass, sky, dog, cat"),
    ):
        write_masks(own, mask)
        with pytest.raises(DataError, match=words):
            inspect_masks([opened(own, classes=classes, background_index=background)])


def test_masks_that_count_from_1(own: Path) -> None:
    write_masks(own, [1, 2, 255], [3, 4])
    with pytest.raises(DataError, match="shifted: 1, 2, 3, 4, 255 occur.*4 is no class: subtract 1"):
        inspect_masks([opened(own)])
    write_masks(own, [1, 2, 255], [3, 2])
    notes = inspect_masks([opened(own)])
    assert len(notes) == 2 and "no mask of mine shows grass" in notes[0] and "count from 1" in notes[1]
    write_masks(own, [0, 1, 2], [1, 200])
    assert any("numbers 200 are skipped" in note for note in inspect_masks([opened(own)]))


@pytest.mark.parametrize(("number", "words"), [(255, "void"), (0, "void"), (77, "holds the index 77")])
def test_a_benchmark_whose_masks_show_nothing(tmp_path: Path, number: int, words: str) -> None:
    kit = make_voc(tmp_path)
    assert inspect_masks([open_set(tmp_path, "voc2012", "train")]) == []
    for path in [*(kit / "SegmentationClass").iterdir(), *(kit / "SegmentationClassAug").iterdir()]:
        Image.fromarray(np.full((48, 72), number, dtype=np.uint8)).save(path)
    with pytest.raises(DataError, match=f"None of 4 masks of voc2012 shows a class, so nothing can be learned.*{words}"):
        inspect_masks([open_set(tmp_path, "voc2012", "train")])


def test_seen_means_that_a_mask_showed_it(own: Path) -> None:
    write_masks(own, [0, 2], [2, 0, 255])
    dataset = opened(own)
    (note,) = inspect_masks([dataset])
    assert note == "no mask of mine shows sky, cat, so they do not count as seen"
    vocabulary = Vocabulary([dataset], other_words={"sky": ["heavens"], "dog": ["puppy"]})
    assert vocabulary.spellings == ["grass", "dog"] and vocabulary.seen_words == {"dog": ["puppy"]}
    assert len(vocabulary) == 4  # the others stay true negatives


def test_names_that_occur_twice(own: Path) -> None:
    for classes in (["sky", "dog", "sky"], ["Sky", "dog", "sky "]):
        with pytest.raises(DataError, match="'classes' names 'sky' more than once"):
            opened(own, classes=classes)
    notes = inspect_masks([opened(own, classes=["sofa", "sky", "couch", "dog"])])
    assert notes == ["mine: 'sofa' and 'couch' mean the same and are learned as one class"]


def test_a_folder_that_cannot_be_read_is_a_sentence(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = Path.iterdir

    def refuse(path: Path) -> object:
        if path.name == "images":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=rf"mine cannot be read: {own}/images: Permission denied"):
        opened(own)


# ---- the trainer


def test_the_trainer_refuses_before_the_first_step_and_warns(
    configure: Configure, own: Path, capsys: pytest.CaptureFixture
) -> None:
    config = configure("own", "sets={mine: 1}", "unseen=none", "max_train_steps=2", "crop=32", f"data={own.parent}")
    write_masks(own, [0, 255])
    opened(own, classes=["background", "dog"], background_index=0)
    steps: list[int] = []
    with pytest.raises(DataError, match="255 is void"):
        train(config, on_step=lambda step, parts: steps.append(step))
    assert not steps
    write_masks(own, [0, 2], [2, 0, 255])
    opened(own, classes=CLASSES, background_index=None)
    folder = train(config)
    assert load_checkpoint(folder)[1]["seen_names"] == ["grass", "dog"]
    warning = "warning: no mask of mine shows sky, cat, so they do not count as seen"
    assert warning in (folder / "log.txt").read_text() and warning in capsys.readouterr().out


def test_every_folder_that_is_written_is_checked_first(configure: Configure, own: Path) -> None:
    words = "/proc/ldvc cannot be written: .*; give another --cache_dir"
    with pytest.raises(LdvcError, match=words):
        train(configure("nocache", "cache_dir=/proc/ldvc", "views_per_photo=1"))
    with pytest.raises(SystemExit, match=words):
        evaluate_main(["--checkpoint", "x", "--data", str(own.parent), "--sets", "mine", "--cache_dir", "/proc/ldvc"])


def test_a_set_with_slashes_is_evaluated_and_written(own: Path, tiny_checkpoint: Path) -> None:
    """B4: the confusion matrix of "mine/" is a file beside the tables."""
    output = own.parent / "results" / "O"
    command = ["--checkpoint", str(tiny_checkpoint), "--data", str(own.parent), "--sets", "mine/", "./mine", "--joint_only"]
    evaluate_main([*command, "--output", str(output), "--cache_dir", str(own.parent / "cache")])
    assert {path.name for path in output.parent.iterdir()} == {"O.json", "O.csv", "O.md", "O-ldvc-mine.png"}
    assert all(path.name.startswith("patch-tokens-mine-val-") for path in (own.parent / "cache").iterdir())


@pytest.mark.parametrize(
    ("asked", "flags", "counts"),
    [
        ("no", [], "no"), ("no", ["--mixed_precision", "bf16"], "bf16"), ("no", ["--set", "mixed_precision=bf16"], "bf16"),
        ("bf16", [], "bf16"), (None, [], "auto"),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_launcher_counts(
    root: Path, asked: str | None, flags: list[str], counts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C6: accelerate launch sets this variable. Flags of the trainer count more, its configuration less."""
    found: list[str] = []
    monkeypatch.setattr("train.train.train", lambda config, **options: found.append(config.mixed_precision))
    (root / "auto.yaml").write_text("base: tiny.yaml\nmixed_precision: auto\n")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    main(["--config", str(root / "auto.yaml"), *flags])
    assert found == [counts]
