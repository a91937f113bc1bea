"""The arrays behind the figures, as one file for `numpy.load`.

    arrays = numpy.load("dog.npz")
    arrays["names"], arrays["ldvc/attention"][-1].mean(axis=0)

C classes with E words, a photo of H x W pixels and a grid of h x w patches:

    names                    (C,) text        the first word of each class
    words, class_of_word     (E,) text, int   all words, and the index of the class of each
    seen                     (C,) bool        whether the model was trained on masks of the class
    company                  (n,) text        words that share the attention with a single name
    size, grid               (2,) int         (H, W) and (h, w)
    extent                   (2,) float32     height and width of the photo in patches; less than the grid where it is padded

and for each decoder, as "ldvc/labels" and so on (attention: not for "clip"; routing: for "ldvc" only):

    labels                   (H, W) int16     index of the class, -1 = none of these
    threshold                () float32       pixels with a lower score are none of these; NaN = no threshold
    thresholds               (C,) float32     the threshold of each class
    scores                   (C, H', W') float16    in 0..1; long side at most `SCORES_SIDE`
    boxes                    (C, 4) int32     x, y, width, height of the class's pixels; zeros where it has none
    attention                (layers, heads, C, h, w) float32    see `Segmentation.cross_attention`
    attention_mean           (layers, C, h, w) float32           attention by the mean score of all heads
    none_attention           (layers, heads, h, w) float32       attention to none of these
    company_attention        (layers, heads, h, w) float32       attention to all of `company`; all attentions sum to 1
    windows                  (n, 4) float32   top, left, height, width of each window, in patches of the photo
    routing_boxes            (n, R, 4) int    top, left, bottom, right of each region, in patches of its window
    routing_regions          (n, layers, R, k) int      the regions that each region chose, best first
    routing_affinity         (n, layers, R, R) float32  affinity of the row's region to the column's
"""

import io
from collections.abc import Mapping
from dataclasses import astuple

import numpy as np

from ldvc.annotations import box_of
from ldvc.result import Segmentation
from ldvc.visualize import fit_size

SCORES_SIDE = 1024


def npz(results: Mapping[str, Segmentation | None]) -> bytes:
    """The content of an NPZ file: the results of several decoders for the same photo and names."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays(results))
    return buffer.getvalue()


def arrays(results: Mapping[str, Segmentation | None]) -> dict[str, np.ndarray]:
    """All arrays by name, see the docstring of the module; results that are None are left out."""
    available = {decoder: result for decoder, result in results.items() if result is not None}
    first = next(iter(available.values()))
    named_arrays = {
        "names": np.array(first.names),
        "words": np.array([word for words in first.synonyms for word in words]),
        "class_of_word": np.array(first.embedding_classes),
        "seen": np.array(first.seen),
        "company": np.array(first.company, dtype=str),
        "size": np.array(first.size),
        "grid": np.array(first.grid),
        "extent": np.array(first.extent, dtype=np.float32),
    }
    for decoder, result in available.items():
        parts = of_masks(result) | of_attention(result) | of_routing(result)
        named_arrays |= {f"{decoder}/{key}": value for key, value in parts.items()}
    return named_arrays


def of_masks(result: Segmentation) -> dict[str, np.ndarray]:
    """Labels, scores and boxes."""
    labels, scores = result.labels, result.scores_at(fit_size(*result.size, long_side=SCORES_SIDE))
    return {
        "labels": labels.astype(np.int16),
        "threshold": np.float32(np.nan if result.background is None else result.background),
        "thresholds": np.array([result.threshold_of(name) for name in result.names], dtype=np.float32),
        "scores": scores.astype(np.float16),
        "boxes": np.array([box_of(labels == index) for index in range(len(result.names))], dtype=np.int32),
    }


def of_attention(result: Segmentation) -> dict[str, np.ndarray]:
    """Attention of every layer and head; empty if the result holds none."""
    layers, heads = map(range, result.attention_shape)
    if not layers:
        return {}
    readers = (result.cross_attention, result.none_attention, result.company_attention)
    maps = [np.stack([[read(layer, head) for head in heads] for layer in layers]) for read in readers]
    by_name = dict(zip(("attention", "none_attention", "company_attention"), maps, strict=True))
    return {**by_name, "attention_mean": np.stack([result.cross_attention(layer) for layer in layers])}


def of_routing(result: Segmentation) -> dict[str, np.ndarray]:
    """The regions of LCSA in every window; empty if the result holds no routing. All windows have the same size."""
    if not result.has_routing:
        return {}
    routings = [output.routing for output in result.outputs]
    layouts = [layers[0].layout for layers in routings]
    return {
        "windows": np.array([astuple(each.window) for each in result.outputs], dtype=np.float32) / result.patch,
        "routing_boxes": np.array([[layout.box(region) for region in range(layout.total)] for layout in layouts]),
        "routing_regions": np.stack([[layer.regions[0].numpy() for layer in layers] for layers in routings]),
        "routing_affinity": np.stack([[layer.affinity[0].float().numpy() for layer in layers] for layers in routings]),
    }
