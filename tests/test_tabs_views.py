"""The HTML of the tabs, decoded: pixels, coordinates, numbers, and names that stay text."""

from __future__ import annotations

import base64
import copy
import io
import re
import zlib
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import pdist

from ldvc.embedding_space import movement_of, shared_space
from ldvc.predictor import Predictor
from ldvc.visualize import colours_for, heat_table
from ldvc.web import texts
from ldvc.web.html import GREY, heat_uri, number, photo_uri
from ldvc.web.segmenter import LCSA_OFF
from ldvc.web.tabs import attention_maps as attention
from ldvc.web.tabs import compare
from ldvc.web.tabs.attention_maps import Column, attention_grid, heads_html, value_range
from ldvc.web.tabs.compare import Painted, compare_html, paint_all
from ldvc.web.tabs.patch import CHOSEN, NO_DECODER, similarity_html, within
from ldvc.web.tabs.routing import BARS, RoutedPatch, route_html
from ldvc.web.tabs.segment import MAPS_SHOWN, class_maps, viewer_data
from ldvc.web.tabs.space import LABELS, LINE, MOVED, PATCHES, Frame, space_html, spread
from tests.browsing import EVIL

NAMES = ["dog", EVIL, "sofa | couch"]
CHOSEN_MAP = {"layer": 1, "head": None, "photo": "data:"}
TITLES = ["dog", EVIL, "sofa"]
COLOURS = colours_for(TITLES)


class Page(HTMLParser):
    """The tags of an HTML text with their attributes, and the text between the tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [each for name, each in self.tags if name == tag and kind in (each.get("class") or "").split() + [""]]


def pixels(uri: str, mode: str = "RGB") -> np.ndarray:
    assert uri.startswith("data:image/")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert(mode)).astype(int)


@pytest.fixture(scope="module")
def results(tiny_predictor: Predictor) -> dict:
    """Results for a photo whose input size is not a multiple of the patch, on a grid that is not a multiple of the regions."""
    photo = np.random.default_rng(0).integers(0, 255, (130, 215, 3), dtype=np.uint8)
    image = tiny_predictor.encode_image(photo)
    decoders = ("ldvc", "ldvc_without_lcsa", "zegclip", "clip")
    return {decoder: tiny_predictor.sibling(decoder).segment(NAMES, image=image, features=True) for decoder in decoders}


def test_heat_is_the_scale_and_transparent_outside() -> None:
    values = np.array([[0.0, 0.25, 0.5], [0.75, 1.0, 2.0]])
    drawn = pixels(heat_uri(values))
    expected = heat_table()[(values.clip(0, 1) * 255).round().astype(int)]
    assert np.abs(drawn - expected).max() <= 3  # one of 255 steps
    stretched = pixels(heat_uri(np.array([[0.2, 0.4]]), low=0.2, high=0.4))
    assert (stretched[0, 0] == heat_table()[0]).all() and (stretched[0, 1] == heat_table()[255]).all()
    inside = np.array([[True, False, True], [False, True, True]])
    assert (pixels(heat_uri(values, inside=inside), "RGBA")[..., 3] == np.where(inside, 255, 0)).all()


def test_photos_are_shrunk() -> None:
    picture = np.zeros((300, 400, 3), dtype=np.uint8)
    picture[:, 200:] = [255, 0, 0]
    coloured, grey = (pixels(photo_uri(picture, long_side=200, grey=grey)) for grey in (False, True))
    assert coloured.shape == (150, 200, 3) and np.abs(coloured[75, 180] - [254, 0, 0]).max() < 6
    assert np.ptp(grey[75, 180]) == 0 and abs(grey[75, 180, 0] - (128 + (76 - 128) * 0.9)) < 3


def unpacked(text: str) -> np.ndarray:
    differences = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return differences.cumsum(dtype=np.uint8).astype(int)


def test_the_browser_has_all_it_needs_to_paint(results: dict) -> None:
    """The best class and the comparison with the default threshold are exact; scores are exact to 1 / 255."""
    result = results["ldvc"]
    best, exact = result.best_at(result.size)
    own = float(np.median(exact))
    data = viewer_data(result, photo="data:", own_threshold=own)
    labels, scores = (unpacked(data[key]).reshape(result.size) for key in ("labels", "scores"))
    assert np.array_equal(labels, best) and np.array_equal(scores >= own * 255, exact >= own)
    assert np.abs(scores / 255 - exact).max() <= 1 / 255
    assert [each["title"] for each in data["classes"]] == ["dog", EVIL, "sofa | couch"]
    assert [each["name"] for each in data["classes"]] == result.names and data["own_threshold"] == own


def test_class_maps(results: dict) -> None:
    page = Page(class_maps(results["ldvc"], photo="data:"))
    assert len(page.all("img")) == 3 and EVIL in page.text and all("Score of" in each["alt"] for each in page.all("img"))


def test_of_a_long_list_the_strongest_are_shown(tiny_predictor: Predictor, results: dict) -> None:
    """The limits of three tabs: class maps, attention of a patch to names, labels in the plane."""
    names = ["dog", EVIL, *(f"thing {index}" for index in range(MAPS_SHOWN))]
    image = tiny_predictor.encode_image(results["ldvc"].picture)
    result = tiny_predictor.segment(names, image=image, features=True)
    many = class_maps(result, photo="data:")
    assert many.count("<figure") == MAPS_SHOWN and f"The {MAPS_SHOWN} classes that cover most" in many

    patch = RoutedPatch(result, 0, 0, -1, None)
    page = Page(route_html(patch, photo="data:"))
    assert f"and {len(names) - BARS} more names" in page.text
    assert all(names[index] in page.text for index in np.argsort(-patch.shares)[:BARS])

    space = shared_space({"ldvc": movement_of(result)})
    patch_names = {names[label] for label in space.decoders["ldvc"].class_of_patch}
    source = space_html(space, names, names, colours_for(names))
    written = [unescape(word) for word in re.findall(r"<text [^>]*>([^<]*)</text>", source)]
    assert 0 < len(written) <= LABELS and {word[:12] for word in written} <= {name[:12] for name in patch_names}
    assert len(Page(source).all("path", "ldvc-diamond")) == len(names) == source.count("<title>")
    assert f"Of the {len(names)} names" in source and "<img" not in source


@pytest.fixture(scope="module")
def columns(results: dict) -> list[Column]:
    maps = {"ldvc": results["ldvc"], "zegclip": results["zegclip"], "ldvc_without_lcsa": None, "ldvc_lcsa_off": results["ldvc"]}
    return [Column(decoder, result, layer=0, head=1) for decoder, result in maps.items()]


def test_attention_grid(columns: list[Column], results: dict) -> None:
    photo = photo_uri(results["ldvc"].picture, **GREY)
    source = attention_grid(columns, [0, 1], photo=photo, rescale=False)
    page = Page(source)
    heats = page.all("img")
    assert len(heats) == 2 * 3 and len(page.all("figure", "ldvc-map-missing")) == 2
    assert texts.DECODER_MISSING in page.text and attention.FIXED_SCALE in page.text
    assert source.count(attention.INTERVENTION) >= 2 and all("alt" in heat for heat in heats)
    assert EVIL in page.text and EVIL in heats[3]["alt"] and page.text.count("unseen") == 1
    assert source.count(photo) == 1  # the photo is sent once for all maps

    # The first map, resized by torch: patches of 16 pixels of the input, whose last column is partly padding.
    result = results["ldvc"]
    values = torch.from_numpy(result.cross_attention(layer=0, head=1)[0])[None, None]
    height, width = result.extent
    whole = torch.nn.functional.interpolate(values, scale_factor=16, mode="bilinear")
    drawn, photo = pixels(heats[0]["src"]), whole[..., : round(height * 16), : round(width * 16)]
    reference = torch.nn.functional.interpolate(photo, size=drawn.shape[:2], mode="bilinear")[0, 0]
    expected = heat_table()[(reference.numpy() * 255).round().astype(int)]
    assert np.abs(drawn - expected).mean() < 2


def test_rescaling_is_said_and_is_of_what_is_shown(columns: list[Column], results: dict) -> None:
    assert value_range(columns, [0, 1], rescale=False) == (0, 1)
    low, high = value_range(columns, [1], rescale=True)
    shown = np.concatenate([column.maps[1].ravel() for column in columns if column.maps is not None])
    assert (low, high) == (pytest.approx(shown.min()), pytest.approx(shown.max()))
    heads = heads_html(results["ldvc"], LCSA_OFF, 0, **CHOSEN_MAP, rescale=True)
    for source in (attention_grid(columns, [1], photo="data:", rescale=True), heads):
        page = Page(source)
        assert attention.RESCALED in page.text and attention.INTERVENTION in page.text
        brightest = max(pixels(heat["src"]).sum(axis=2).max() for heat in page.all("img"))
        assert brightest > heat_table()[230].astype(int).sum(), "the maximum must have the brightest colour"


def test_attention_inside_and_outside_the_mask(results: dict) -> None:
    """The shares in the captions, from the drawn map and the decoder's label map with its threshold; a dash for no pixel."""
    result = copy.copy(results["ldvc"])
    result.background = float(np.quantile(result.best_at(result.size)[1], 0.3))
    column = Column("ldvc", result, layer=-1, head=None)
    assert (column.labels < 0).mean() == pytest.approx(0.3, abs=0.1)
    page = Page(attention_grid([column], [0, 1, 2], photo="data:", rescale=False))
    captions = re.findall(r"inside its mask (–|<?\d+%), outside (–|<?\d+%)", page.text.replace("\u202f", ""))
    drawn = result.attention_at(result.cross_attention(), column.labels.shape)
    assert len(captions) == 3
    for index, caption in enumerate(captions):
        for share, part in zip(caption, (column.labels == index, column.labels != index), strict=True):
            assert share == (f"{drawn[index][part].mean() * 100:.0f}%" if part.any() else "–")
    result.background = 1.1  # no score reaches it
    unlabelled = Column("ldvc", result, layer=-1, head=None)
    assert unlabelled.inside_outside(0) == (None, pytest.approx(drawn[0].mean()))


def test_company_has_a_row(tiny_predictor: Predictor) -> None:
    photo = np.random.default_rng(4).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    result = tiny_predictor.segment("dog", image=tiny_predictor.encode_image(photo), company=("wall", EVIL), features=True)
    result.background = None
    columns = [Column("ldvc", result, layer=-1, head=0), Column("zegclip")]
    assert np.allclose(columns[0].company + columns[0].none + columns[0].maps[0], 1, atol=1e-6)
    assert columns[0].inside_outside(0)[1] is None, "a single name without a threshold covers the photo"
    page = Page(attention_grid(columns, [0], photo="data:", rescale=False))
    assert f"{texts.COMPANY}: wall, {EVIL} {attention.COMPANY_HELP}" in page.text
    heats = page.all("img")
    assert [texts.NONE_OF_THESE in heat["alt"] for heat in heats] == [False, False, True]
    assert len(page.all("figure", "ldvc-map-missing")) == 3
    expected = heat_table()[(columns[0].enlarged(columns[0].company, 112) * 255).round().astype(int)]
    assert np.abs(pixels(heats[1]["src"]) - expected).max() <= 4  # one of 255 steps
    patch = RoutedPatch(result, 0, 0, -1, 0)
    assert number(float(columns[0].company[0, 0])) in Page(route_html(patch, photo="data:")).text


def test_a_map_for_each_layer_and_head(results: dict) -> None:
    result = results["ldvc"]
    layers, count = result.attention_shape
    source = heads_html(result, "ldvc", 1, **CHOSEN_MAP, rescale=False)
    page = Page(source)
    buttons, pictures = page.all("button"), page.all("img")
    places = [(int(each["data-layer"]), int(each["data-head"])) for each in buttons]
    assert places == [(layer, head) for layer in range(layers) for head in range(-1, count)]
    assert [place for place, each in zip(places, buttons, strict=True) if each["aria-pressed"] == "true"] == [(1, -1)]
    assert len({each["aria-label"] for each in buttons}) == len(buttons) and attention.FIXED_SCALE in page.text
    assert EVIL in page.text and "<img src=x" not in source and attention.INTERVENTION not in page.text

    drawn = [pixels(each["src"]) for each in pictures]
    for (layer, head), picture in zip(places, drawn, strict=False):  # the last picture is the enlarged one
        values = result.cross_attention(layer, None if head < 0 else head)[1]
        expected = heat_table()[(result.attention_at(values, picture.shape[:2]) * 255).round().astype(int)]
        assert np.abs(picture - expected).max() <= 4  # one of 255 steps
    assert len(drawn) == len(buttons) + 1 and (drawn[-1] == drawn[places.index((1, -1))]).all()
    shares = result.attention_at(result.cross_attention()[1], drawn[0].shape[:2])
    inside = result.labels_at(shares.shape) == 1
    caption = f"inside its mask {shares[inside].mean() * 100:.0f}\u202f%, outside {shares[~inside].mean() * 100:.0f}\u202f%"
    assert page.text.endswith(caption) and buttons[places.index((1, -1))]["aria-label"].endswith(caption)


def test_every_patch_of_an_odd_grid(results: dict) -> None:
    """Against the definition: regions of ceil(side / 3) patches, clipped to the photo."""
    result = results["ldvc"]
    rows, columns = result.grid
    height, width = result.extent
    assert (height, width) != (rows, columns), "the last patches must be partly padding"
    down, along = -(-rows // 3), -(-columns // 3)
    for row, column in np.ndindex(rows, columns):
        patch, scores = RoutedPatch(result, row, column, -1, None), result.patch_scores(row, column)
        assert patch.label == int(scores.argmax()) and patch.score == pytest.approx(scores.max())
        left, top = column // along * along, row // down * down
        assert patch.own_box == pytest.approx((left, top, min(left + along, width) - left, min(top + down, height) - top))
        attention = patch.routing.token_attention.mean(axis=0)
        inside = [attention[round(y) : round(y) + down, round(x) : round(x) + along].sum() for x, y, _, _ in patch.boxes]
        assert patch.inside == pytest.approx(inside, abs=1e-6)
        assert [sum(patch.inside), patch.shares.sum() + patch.none] == pytest.approx([1, 1], abs=1e-5)
        chosen = result.outputs[0].routing[1].token_attention(row, column)[0].numpy() > 0
        assert np.array_equal(within(patch.boxes, result.grid, result.extent), chosen)
        assert list(patch.routing.affinity) == sorted(patch.routing.all_affinities, reverse=True)[: len(patch.inside)]
    assert RoutedPatch(result, 999, -5, -1, None).row == rows - 1  # the nearest


def test_patch_in_sliding_windows(tiny_predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions of the second window are inside this window."""
    monkeypatch.setattr(tiny_predictor, "inference", {"short_side": 64, "window": 64, "stride": 48})
    photo = np.random.default_rng(1).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    result = tiny_predictor.segment(NAMES, image=tiny_predictor.encode_image(photo))
    patch = RoutedPatch(result, 1, 7, 0, 0)
    assert patch.origin == (0, 4) and patch.routing.patch == (1, 3)
    assert all(x >= 4 and x + w <= 8 for x, _, w, _ in patch.boxes)


def test_route_draws_what_was_found(results: dict) -> None:
    result = results["ldvc"]
    patch = RoutedPatch(result, 2, 3, 1, 0)
    source = route_html(patch, photo="data:image/jpeg;base64,QQ==")
    page = Page(source)
    sides = ("x", "y", "width", "height")
    regions = [tuple(float(rect[side]) for side in sides) for rect in page.all("rect", "ldvc-region")]
    chosen = len(patch.boxes)
    assert regions[:chosen] == [pytest.approx(box, abs=1e-3) for box in patch.boxes]
    box = page.all("rect", "ldvc-patch")[0]
    assert [float(box[side]) for side in sides] == [3, 2, 1, 1]
    for affinity in patch.routing.affinity:
        assert number(float(affinity), 1) in page.text and number(float(affinity), 2) in page.text

    # The heat is transparent outside the chosen regions, and brightest at the maximum of the head.
    (heat,) = page.all("img", "ldvc-stage-heat")
    drawn = pixels(heat["src"], "RGBA")
    assert ((drawn[..., 3] > 0) == (result.outputs[0].routing[1].token_attention(2, 3)[0].numpy() > 0)).all()
    attention = result.routing(2, 3, 1).token_attention[0]
    brightest = np.unravel_index((drawn[..., :3].sum(axis=2) * (drawn[..., 3] > 0)).argmax(), attention.shape)
    assert attention[brightest] == attention.max() and (drawn[brightest][:3] == heat_table()[255]).all()

    shares = result.cross_attention(layer=1, head=0)[:, 2, 3]
    for share, name in zip(shares, TITLES, strict=True):
        assert number(float(share)) in page.text and name in page.text
    stage = page.all("div", "ldvc-stage")[0]
    assert stage["tabindex"] == "0" and stage["data-row"] == "2" and stage["data-column"] == "3"
    assert "Row 3 of" in page.text and EVIL in page.text and len(page.all("img")) == 4


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_patch_below_the_threshold_is_none_of_these(results: dict, threshold: float) -> None:
    result = copy.copy(results["ldvc"])
    patch = RoutedPatch(result, 2, 3, 1, 0)
    name = result.names[patch.label]
    result.background, result.thresholds = 0.0, {name: threshold}
    text = Page(route_html(patch, photo="data:")).text
    verdict = texts.NONE_OF_THESE if threshold else name
    assert f"Row 3, column 4 is {verdict}" in text and (f"score {number(patch.score)}" in text) == (not threshold)


def test_patches_alike_before_and_after(results: dict) -> None:
    result = results["ldvc"]
    patch = RoutedPatch(result, 2, 3, 1, 0)
    page = Page(similarity_html(result, 2, 3, chosen=patch.boxes))
    inside = result.outputs[0].routing[1].token_attention(2, 3)[0].numpy() > 0
    for picture, after in zip(page.all("img"), (False, True), strict=True):
        similarity = result.patch_similarity(2, 3, after=after)
        drawn = pixels(picture["src"])
        expected = result.attention_at(similarity, drawn.shape[:2]).clip(0, 1)
        assert np.abs(drawn - heat_table()[(expected * 255).round().astype(int)]).max() <= 4
        means = {"inside": number(similarity[inside].mean()), "outside": number(similarity[~inside].mean())}
        assert CHOSEN.format(**means) in page.text
    assert len(page.all("rect", "ldvc-region")) == 2 * len(patch.boxes) and len(page.all("rect", "ldvc-patch")) == 2
    assert "negative values are drawn as 0" in page.text
    assert page.text in Page(route_html(patch, photo="data:")).text
    plain = Page(similarity_html(results["clip"], 0, 0))
    assert len(plain.all("img")) == 1 and NO_DECODER in plain.text and not plain.all("rect", "ldvc-region")


def test_space_html(results: dict) -> None:
    space = shared_space({decoder: movement_of(results[decoder]) for decoder in ("ldvc", "zegclip")})
    words = ["dog", EVIL, "sofa", "couch"]
    source = space_html(space, words, TITLES, COLOURS)
    page = Page(source)
    count = len(space.decoders["ldvc"].patches_before)
    assert len(page.all("circle")) == 2 * min(PATCHES, count) and len(page.all("path", "ldvc-diamond")) == 2 * 4
    assert "<img" not in source and EVIL in page.text
    assert page.text.count("0 (stayed)") == 2  # the names of one decoder, the patches of the other
    assert number(space.decoders["ldvc"].drift["patches"], 3) in page.text
    assert number(space.decoders["zegclip"].drift["classes"], 3) in page.text
    assert [MOVED[which] in page.text for which in ("patches", "names")] == [True, True]

    # The end point of a dot is the position of the patch after the decoder.
    frame = Frame(space)
    after = frame(space.decoders["ldvc"].patches_after)
    for dot in page.all("circle")[: min(PATCHES, count)]:
        dx, dy = (float(step) for step in re.findall(r"--d[xy]:(-?[\d.]+)", dot["style"]))
        end = np.array([float(dot["cx"]) + dx, float(dot["cy"]) + dy])
        assert np.abs(after - end).max(axis=1).min() < 0.2
    assert all(0 <= float(dot["cx"]) <= 480 and 0 <= float(dot["cy"]) <= frame.height for dot in page.all("circle"))
    in_plane, in_plot = (pdist(points) for points in (space.decoders["ldvc"].patches_after, after))
    assert np.allclose(in_plot, in_plane * in_plot.max() / in_plane.max()), "distances keep their ratios"


def test_labels_do_not_cover_each_other() -> None:
    heights, places = np.array([100.0, 101, 102, 103, 300]), np.array([50.0, 60, 70, 400, 60])
    positions = spread(heights, places, low=LINE, high=400)
    near = np.sort(positions[:3])
    assert (np.diff(near) >= LINE - 0.1).all() and abs(near.mean() - 101) < 1
    assert positions[3] == 103 and positions[4] == 300  # labels far from the others stay
    assert spread(np.array([5.0, 399.0]), np.zeros(2), low=17, high=380).tolist() == [17, 380]


def test_compare_html(results: dict) -> None:
    pictures = paint_all([None if decoder == "ldvc_without_lcsa" else results[decoder] for decoder in compare.DECODERS])
    painted = {decoder: picture for decoder, picture in pictures.items() if picture is not None}
    page = Page(compare_html(pictures, {"ldvc_without_lcsa": f"How to get it. {EVIL}"}))
    assert len(page.all("img")) == 3 and len(page.all("figure")) == 4 and f"How to get it. {EVIL}" in page.text
    for (decoder, picture), image in zip(painted.items(), page.all("img"), strict=True):
        drawn = pixels(image["src"])
        assert drawn.shape == picture.overlay.shape and np.abs(drawn - picture.overlay).mean() < 20
        assert texts.DECODER_TITLES[decoder] in image["alt"]
    unseen = [share > 0 for picture in painted.values() for share in picture.shares[1:]]
    assert page.text.count("unseen") == sum(unseen) > 0, "each name except the first"
    for decoder in ("clip", "zegclip"):
        share = (painted[decoder].labels != painted["ldvc"].labels).mean()
        percentage = "<1" if 0 < share < 0.01 else f"{share * 100:.0f}"
        assert compare.DIFFERS.format(share=f"{percentage}\u202f%") in page.text

    result = copy.copy(results["ldvc"])
    result.background = float(np.median(result.best_at(result.size)[1]))
    half = Painted(result)
    assert (half.labels < 0).mean() == pytest.approx(0.5, abs=0.1)
    for own_thresholds in (True, False):
        text = Page(compare_html({"ldvc": half}, {}, own_thresholds=own_thresholds)).text
        assert texts.NONE_OF_THESE in text and (compare.OWN_THRESHOLDS in text) == own_thresholds
