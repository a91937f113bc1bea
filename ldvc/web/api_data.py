"""Checks of the arguments and data of the results for the endpoints of `ldvc.web.api`."""

from __future__ import annotations

import contextlib
from typing import Any

import gradio as gr
import numpy as np

from ldvc.embedding_space import Space
from ldvc.result import Segmentation
from ldvc.web.tabs.routing import RoutedPatch


def refusal(sentence: str) -> gr.Error:
    """An error that a program receives as one sentence."""
    return gr.Error(sentence, print_exception=False)


def layer_and_head(result: Segmentation, layer: float | None, head: float | None) -> tuple[int, int | None]:
    """Indices of a layer and a head that count from 1, or `refusal`. Layer 0 is the last; head 0 is the mean of all (None)."""
    layers, heads = result.attention_shape
    layer, head = whole(layer, "layer"), whole(head, "head")
    if not 0 <= layer <= layers:
        raise refusal(f"There is no layer {layer}; ask for 1 to {layers}, or 0 for the last.")
    if not 0 <= head <= heads:
        raise refusal(f"There is no head {head}; ask for 1 to {heads}, or 0 for the mean of all.")
    return (layer or layers) - 1, head - 1 if head else None


def place(result: Segmentation, row: float | None, column: float | None) -> tuple[int, int]:
    """Indices (row, column) of a patch whose numbers count from 1, or `refusal`; 0 is the middle."""
    rows, columns = result.grid
    row, column = whole(row, "row") or rows // 2 + 1, whole(column, "column") or columns // 2 + 1
    if not (1 <= row <= rows and 1 <= column <= columns):
        raise refusal(f"There is no patch in row {row}, column {column}; the photo has {rows} rows and {columns} columns.")
    return row - 1, column - 1


def names_of(layer: int, head: int | None) -> dict[str, Any]:
    """Numbers for programs, which count from 1, of a layer index and a head index (None = mean)."""
    return {"layer": layer + 1, "head": "mean" if head is None else head + 1}


def whole(value: Any, name: str) -> int:
    """The value of an argument as a whole number, or `refusal`; None counts as 0."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = float(value or 0)
        if number == int(number) and not isinstance(value, bool):
            return int(number)
    raise refusal(f"{name} is a whole number, not “{value}”.")


def rounded(values: np.ndarray, digits: int = 4) -> list:
    """An array as nested lists of rounded numbers."""
    return values.round(digits).tolist()


def patch_data(patch: RoutedPatch) -> dict[str, Any]:
    """The data of the endpoint "routing" for a patch."""
    result, (rows, columns) = patch.result, patch.result.grid
    regions = zip(patch.boxes, patch.routing.affinity, patch.inside, strict=True)
    return {
        "patch": {"row": patch.row + 1, "column": patch.column + 1},
        "grid": {"rows": rows, "columns": columns},
        "class": {"name": result.names[patch.label], "score": round(patch.score, 4)},
        "own_region": [round(side, 4) for side in patch.own_box],
        "regions": [
            {"box": [round(side, 4) for side in box], "affinity": round(float(affinity), 4), "attention": round(share, 4)}
            for box, affinity, share in regions
        ],
        "affinities": rounded(patch.routing.all_affinities.reshape(patch.routing.region_grid)),
        "token_attention": rounded(patch.attention, 5),
        "softmax": dict(zip(result.names, rounded(patch.shares), strict=True)),
        "company": result.company,
        "none_of_these": round(patch.none, 4),
    }


def space_data(space: Space, words: list[str], names: list[str]) -> dict[str, Any]:
    """The data of the endpoint "space": the plane and the decoders."""
    decoders = {}
    for decoder, part in space.decoders.items():
        classes = [names[label] for label in part.class_of_embedding]
        places = zip(rounded(part.embeddings_before), rounded(part.embeddings_after), strict=True)
        rows = zip(words, classes, places, part.embedding_drift.tolist(), strict=True)
        decoders[decoder] = {
            "drift": part.drift,
            "similarity": part.similarity,
            "names": [
                {"name": word, "class": name, "before": before, "after": after, "drift": drift}
                for word, name, (before, after), drift in rows
            ],
            "patches": {
                "class": [names[label] for label in part.class_of_patch],
                "before": rounded(part.patches_before),
                "after": rounded(part.patches_after),
            },
        }
    return {"explained_variance": list(space.plane.explained), "decoders": decoders}
