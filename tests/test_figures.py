"""Figures: names are text that a PDF library and an XML parser find, and the same result gives the same file."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pypdf import PdfReader

from ldvc.embedding_space import movement_of, shared_space
from ldvc.figures import DAGGER, DPI, ROWS, UNSEEN, attention_figure, compare_figure, figure_bytes, space_figure
from ldvc.predictor import Predictor
from ldvc.result import Segmentation
from ldvc.visualize import colours_for, rgb
from tests.results import random_photo

NAMES = ["dog", "grass", "$zebra_1$"]
LABELS = ["dog", "grass", f"$zebra 1$ {DAGGER}"]


def ask(main: Predictor, names: list[str], *decoders: str) -> dict[str, Segmentation]:
    options = {"image": main.encode_image(random_photo()), "background": None, "features": True}
    return {decoder: main.sibling(decoder).segment(names, **options) for decoder in decoders}


@pytest.fixture(scope="module")
def results(tiny_predictor: Predictor) -> dict[str, Segmentation]:
    return ask(tiny_predictor, NAMES, "ldvc", "ldvc_without_lcsa", "zegclip", "clip")


@pytest.fixture(scope="module")
def figures(results: dict[str, Segmentation]) -> dict[str, Figure]:
    three = {decoder: results[decoder] for decoder in ("ldvc", "ldvc_without_lcsa", "zegclip")}
    space = shared_space({decoder: movement_of(results[decoder]) for decoder in ("ldvc", "zegclip")})
    return {
        "attention": attention_figure(three),
        "compare": compare_figure(results),
        "space": space_figure(space, results["ldvc"], width=7.0),
    }


def svg_texts(figure: Figure) -> list[str]:
    root = ElementTree.fromstring(figure_bytes(figure, "svg"))
    return ["".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("kind", ["attention", "space"])
def test_names_are_text(figures: dict[str, Figure], kind: str) -> None:
    (page,) = PdfReader(io.BytesIO(figure_bytes(figures[kind], "pdf"))).pages
    text, drawn = " ".join(page.extract_text().split()), svg_texts(figures[kind])
    for each in (*LABELS, UNSEEN):
        assert each in text and each in drawn
    assert "ZegCLIP" in text
    fonts = page["/Resources"]["/Font"].values()
    assert {each.get_object()["/Subtype"] for each in fonts} <= {"/Type0", "/TrueType"}, "fonts are embedded as TrueType"
    width = float(page.mediabox.width) / 72
    assert width == pytest.approx(3.5 if kind == "attention" else 7.0, abs=0.01)


def test_a_comparison_names_what_it_shows(figures: dict[str, Figure], results: dict[str, Segmentation]) -> None:
    shown = {label for result in results.values() for label in np.unique(result.labels)}
    drawn = svg_texts(figures["compare"])
    assert [each in drawn for each in LABELS] == [index in shown for index in range(3)]
    assert "none of these" not in drawn


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_result_gives_the_same_file(results: dict[str, Segmentation], kind: str) -> None:
    first, second = (figure_bytes(compare_figure({"ldvc": results["ldvc"]}), kind) for _ in range(2))
    assert first == second


def pictures(figure: Figure) -> int:
    return sum(bool(axis.images) for axis in figure.axes)


def test_rows_and_columns(figures: dict[str, Figure], results: dict[str, Segmentation]) -> None:
    """A picture for each name, none of these and decoder, and the photo; a decoder that there is not has no column."""
    assert pictures(figures["attention"]) == 4 * 4 and pictures(figures["compare"]) == 5
    assert "none of these" in svg_texts(figures["attention"])
    assert pictures(attention_figure({"ldvc": results["ldvc"], "zegclip": None})) == 4 * 2

    picture = Image.open(io.BytesIO(figure_bytes(figures["attention"], "png"))).convert("RGB")
    assert picture.width == round(3.5 * DPI)
    pixels = set(map(tuple, np.asarray(picture)[:, :60].reshape(-1, 3)))
    assert pixels.issuperset(map(rgb, colours_for(["dog", "grass", "$zebra 1$"]))), "names have the colours of the page"


def test_many_names_and_layers(tiny_predictor: Predictor) -> None:
    results = ask(tiny_predictor, [f"thing {index}" for index in range(30)], "ldvc")
    figure = attention_figure(results, layer=0, head=1)
    assert pictures(figure) == ROWS * 2
    shown, last = (next(axis for axis in each.axes[1:] if axis.images) for each in (figure, attention_figure(results)))
    assert not np.array_equal(shown.images[0].get_array(), last.images[0].get_array())
    drawn = svg_texts(attention_figure(ask(tiny_predictor, ["dog"], "ldvc")))
    assert any(each.startswith("Attention is shared with wall, floor") for each in drawn)
    assert UNSEEN not in drawn, "the dog is seen"
