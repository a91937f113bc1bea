"""Patch features and class embeddings before and after a decoder (Figure 2 of the paper).

LDVC's decoder changes the patch features and keeps the class embeddings; ZegCLIP's does the opposite. This module measures
both changes by cosine distance, and projects all decoders to the plane of one principal component analysis.

    predictor = Predictor.from_pretrained("lite")
    image = predictor.encode_image("dog.jpg")
    results = [predictor.sibling(decoder).segment(names, image=image, features=True) for decoder in ("ldvc", "zegclip")]
    space = shared_space({each.decoder: movement_of(each) for each in results})
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ldvc.result import Segmentation

POINTS = ("patches_before", "patches_after", "embeddings_before", "embeddings_after")  # fields of a `Movement`


def unit(vectors: np.ndarray) -> np.ndarray:
    """Normalise vectors, (n, d) -> (n, d) float64; a zero vector stays zero."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosine_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 - cos of rows, (n, d) x (n, d) -> (n,), as |a - b|^2 / 2 of unit vectors: exactly 0 for equal vectors."""
    return ((unit(first) - unit(second)) ** 2).sum(axis=-1) / 2


@dataclass(frozen=True)
class Movement:
    """Change of patches and class embeddings by one decoder: N patches of all windows, E embeddings of C classes.

    A class has one embedding for each of its words. The text adapter computes another embedding in each window;
    embeddings and their distances are means over windows.
    """

    patches_before: np.ndarray  # (N, d), unit length; (N, 2) in a `Space`
    patches_after: np.ndarray
    embeddings_before: np.ndarray  # (E, d), unit length unless windows are averaged; (E, 2) in a `Space`
    embeddings_after: np.ndarray
    class_of_embedding: np.ndarray  # (E,), index of a class
    class_of_patch: np.ndarray  # (N,), the best class of each patch by this decoder
    embedding_drift: np.ndarray  # (E,), mean cosine distance in all d dimensions between before and after
    patch_drift: np.ndarray  # (N,), the same for patches
    similarity_before: np.ndarray  # (N,), cosine of each patch and the closest word of its class
    similarity_after: np.ndarray

    @property
    def drift(self) -> dict[str, float]:
        """Mean cosine distance between before and after, of "classes" and of "patches"."""
        return {"classes": float(self.embedding_drift.mean()), "patches": float(self.patch_drift.mean())}

    @property
    def similarity(self) -> dict[str, float]:
        """Mean cosine of a patch and its class, "before" and "after"."""
        return {"before": float(self.similarity_before.mean()), "after": float(self.similarity_after.mean())}


def movement_of(result: Segmentation) -> Movement:
    """Measure the change by the decoder of a result; raises LdvcError unless it was segmented with `features=True`."""
    windows, labels = result.features, result.patch_labels
    word_classes, values = np.asarray(result.embedding_classes), {}
    for moment in ("before", "after"):
        patches = [unit(getattr(each, f"patches_{moment}")) for each in windows]
        embeddings = [unit(getattr(each, f"classes_{moment}")) for each in windows]
        values[f"patches_{moment}"] = np.concatenate(patches)
        values[f"embeddings_{moment}"] = np.mean(embeddings, axis=0)
        per_window = zip(patches, embeddings, labels, strict=True)
        similarity = [np.where(best[:, None] == word_classes, a @ b.T, -np.inf).max(axis=1) for a, b, best in per_window]
        values[f"similarity_{moment}"] = np.concatenate(similarity)
    return Movement(
        class_of_embedding=word_classes,
        class_of_patch=np.concatenate(labels),
        embedding_drift=np.mean([cosine_distance(each.classes_before, each.classes_after) for each in windows], axis=0),
        patch_drift=np.concatenate([cosine_distance(each.patches_before, each.patches_after) for each in windows]),
        **values,
    )


@dataclass(frozen=True)
class Plane:
    """The plane of the two largest principal components; the largest element of each axis is positive."""

    mean: np.ndarray  # (d,)
    axes: np.ndarray  # (2, d), orthonormal
    explained: tuple[float, float]  # share of the variance along each axis, in 0..1

    def project(self, points: np.ndarray) -> np.ndarray:
        """(n, d) -> (n, 2)."""
        return (points - self.mean) @ self.axes.T


def fit_plane(points: np.ndarray) -> Plane:
    """Principal component analysis of (n, d) points by the eigenvectors of their covariance.

    If the points differ in fewer than two directions, an axis is arbitrary and its share of the variance is 0.
    """
    mean = points.mean(axis=0)
    centred = points - mean
    variance, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    variance = variance.clip(min=0)
    axes = vectors[:, [-1, -2]].T
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])[:, None]
    shares = variance[[-1, -2]] / (variance.sum() or 1)
    return Plane(mean=mean, axes=axes, explained=(float(shares[0]), float(shares[1])))


@dataclass(frozen=True)
class Space:
    """Several decoders in one plane: points are coordinates in the plane, distances and cosines use all d dimensions."""

    plane: Plane
    decoders: dict[str, Movement]

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, low, right, high) of all points of all decoders."""
        points = np.concatenate([getattr(each, part) for each in self.decoders.values() for part in POINTS])
        return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def shared_space(movements: Mapping[str, Movement]) -> Space:
    """Project the points of several decoders to the plane of one principal component analysis of all of them."""
    plane = fit_plane(np.concatenate([getattr(each, part) for each in movements.values() for part in POINTS]))
    projected = {
        decoder: replace(each, **{part: plane.project(getattr(each, part)) for part in POINTS})
        for decoder, each in movements.items()
    }
    return Space(plane, projected)
