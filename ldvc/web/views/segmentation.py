"""What the Segment tab shows, made from a result: the viewer's data and the maps of every class. No widgets here."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from ldvc.result import Segmentation
from ldvc.visualize import NONE_COLOUR, OPACITY, colours_for, fit_size
from ldvc.web import texts
from ldvc.web.html import escape
from ldvc.web.views.inline import heat_uri, photo_uri

VIEW_SIDE = 1024  # of the painted photo in the browser; downloads have the photo's own size
SCORES_SIDE = 512
MAP_SIDE = 112  # pixels of a class map before the browser enlarges it: four for each patch of lite
MAP_PHOTO_SIDE = 420
MAPS_SHOWN = 60  # class maps drawn at once; longer lists show those that cover most


def titles(result: Segmentation) -> list[str]:
    """What is written for each class: its words, the first one first."""
    return [" | ".join(words) for words in result.synonyms]


def viewer_data(
    result: Segmentation, *, photo: str, own_threshold: float, opacity: float = OPACITY, outline: bool = True
) -> dict[str, Any]:
    """Everything that `viewer.js` needs to paint the photo and to go on painting it without the server.

    Args:
        result: with its threshold.
        photo: the photo as data, from `photo_uri` with `VIEW_SIDE`.
        own_threshold: of the checkpoint, where the slider of "none of these" starts.
        opacity, outline: how the visitor likes it painted.

    Returns:
        Of the pictures, "labels" has a class (1 for the first, 0 for none of these) in its first channel and the best class
        whatever the threshold in its second; "scores" has the score of the best class in 0..255.
    """
    height, width = fit_size(*result.size, long_side=VIEW_SIDE)
    best, exact = result.best_at((height, width))
    labels = best if result.background is None else np.where(exact < result.background, -1, best)
    marks = np.zeros((height, width, 3), dtype=np.uint8)
    marks[..., 0], marks[..., 1] = labels + 1, best + 1
    scores = Image.fromarray((exact * 255).round().astype(np.uint8))
    scores = scores.resize(fit_size(*result.size, long_side=SCORES_SIDE)[::-1], Image.Resampling.BOX)
    rows = zip(result.names, titles(result), result.seen, colours_for(result.names), strict=True)
    return {
        "photo": photo,
        "labels": png_uri(marks),
        "scores": png_uri(np.asarray(scores)),
        "width": width,
        "height": height,
        "classes": [
            {"name": name, "title": title, "seen": seen, "colour": colour} for name, title, seen, colour in rows
        ],
        "threshold": result.background,
        "own_threshold": own_threshold,
        "opacity": opacity,
        "outline": outline,
        "usual_opacity": OPACITY,
        "none": texts.NONE_OF_THESE,
        "none_colour": NONE_COLOUR,
        "note": texts.SEEN_HELP,
    }


def png_uri(picture: np.ndarray) -> str:
    """A picture, uint8 (H, W) or (H, W, 3), without loss as PNG data."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def class_maps(result: Segmentation) -> str:
    """One heat map per class: its score at every pixel, on the scale from 0 to 1."""
    size = fit_size(*result.size, long_side=MAP_SIDE)
    order, maps = list(range(len(result.names))), result.scores_at(size)
    if len(order) > MAPS_SHOWN:
        shares = result.area_shares(result.labels_at(size))
        order = sorted(sorted(order, key=lambda index: -shares[index])[:MAPS_SHOWN])
    figures = []
    for index in order:
        scores, name = maps[index], escape(titles(result)[index])
        kind = texts.SEEN if result.seen[index] else texts.UNSEEN
        figures.append(
            f'<figure class="ldvc-map"><div class="ldvc-heat"><img src="{heat_uri(scores)}" '
            f'alt="Score of {name}: up to {scores.max():.2f}"></div>'
            f'<figcaption><b>{name}</b> <span class="ldvc-tag ldvc-{kind}">{kind}</span> up to {scores.max():.2f}'
            "</figcaption></figure>"
        )
    photo = photo_uri(result.picture, long_side=MAP_PHOTO_SIDE, grey=True, quality=75)
    left_out = len(result.names) - len(order)
    note = f'<p class="ldvc-footnote">{texts.MAPS_LEFT_OUT.format(shown=len(order))}</p>' if left_out else ""
    height, width = result.size
    return f'<div class="ldvc-classmaps" style="--photo:url({photo});--aspect:{width}/{height}">{"".join(figures)}</div>{note}'
