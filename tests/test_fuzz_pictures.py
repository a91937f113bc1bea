"""A sample of `tools/fuzz_pictures.py`: damaged and hostile files end in a picture or a sentence, and cost no memory."""

from pathlib import Path

import pytest

from ldvc.image_io import load_picture
from tools.fuzz_pictures import fuzz, valid_files
from tools.picture_memory import large_files, peak, read_or_refuse

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")


@pytest.mark.parametrize(("name", "data"), valid_files().items(), ids=valid_files())
def test_every_format_is_read(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    picture = load_picture(tmp_path / "file")
    assert sorted(picture.shape) == [3, 64, 96]
    assert picture.std() > 10, "not one colour"


@pytest.mark.filterwarnings("ignore")  # of Pillow about damaged files
def test_damaged_files_end_in_a_picture_or_a_sentence(tmp_path: Path) -> None:
    summary = fuzz(200, 1, tmp_path)
    assert not summary.failures, summary.failures
    assert summary.outcomes.total() == 200 and summary.outcomes["picture"] > 50 and len(summary.outcomes) > 2
    assert all(outcome == "picture" or outcome.endswith(".") for outcome in summary.outcomes)
    before, after = summary.memory
    assert after < before + 50


@linux
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG RGBA", "PNG 16 bits", "JPEG 100 megapixels", "JPEG progressive 4:4:4"])
def test_memory_of_a_large_photo_is_bounded(kind: str, tmp_path: Path) -> None:
    path = large_files(tmp_path)[kind]()
    read_or_refuse(path)
    highest, left = peak(lambda: read_or_refuse(path))
    assert highest < 400 and left < 20
