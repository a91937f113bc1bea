"""Which of the two moved: patch features and class embeddings before and after a decoder (the paper's Figure 2).

LDVC's decoder moves the patches and keeps the names; ZegCLIP's moves the names and keeps the patches. Here both are measured
by cosine distance in CLIP's joint space, and drawn in the plane of one principal component analysis of all decoders
together, so that pictures of two decoders have the same axes.

    predictor = Predictor.from_pretrained("lite")
    image = predictor.encode_image("dog.jpg")
    found = [predictor.sibling(decoder).segment(names, image=image, features=True) for decoder in ("ldvc", "zegclip")]
    space = shared_space({each.decoder: movement_of(each) for each in found})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ldvc.result import Segmentation


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, d) -> (n, d), float64, each of length 1; a zero vector stays zero."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosine_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 - cos of rows, (n, d) x (n, d) -> (n,).

    Written as |a - b|^2 / 2 of unit vectors, which is the same and exactly 0 for a vector that did not move.
    """
    return ((unit(first) - unit(second)) ** 2).sum(axis=-1) / 2


@dataclass(frozen=True)
class Movement:
    """What one decoder did to patches and names of one photo. N patches of all windows, E embeddings of C classes.

    A class has one embedding, or one for each of its synonyms. With several windows a name has one embedding in each, since
    the text adapter knows the window; distances are means over windows, and the embeddings themselves too.

    Attributes:
        patches_before, patches_after: (N, d), unit length.
        embeddings_before, embeddings_after: (E, d), unit length unless windows are averaged.
        class_of_embedding: (E,), index of a class.
        class_of_patch: (N,), the class that this decoder's scores give the patch.
        embedding_drift: (E,), mean cosine distance between before and after.
        patch_drift: (N,), the same for patches.
        similarity_before, similarity_after: (N,), cosine of each patch and its class (of synonyms, the closest).
    """

    patches_before: np.ndarray
    patches_after: np.ndarray
    embeddings_before: np.ndarray
    embeddings_after: np.ndarray
    class_of_embedding: np.ndarray
    class_of_patch: np.ndarray
    embedding_drift: np.ndarray
    patch_drift: np.ndarray
    similarity_before: np.ndarray
    similarity_after: np.ndarray


def similarity_to_class(
    patches: np.ndarray, embeddings: np.ndarray, class_of_patch: np.ndarray, class_of_embedding: np.ndarray
) -> np.ndarray:
    """Cosine of each patch and the embedding of its class, the closest one where a class has several: (N,)."""
    cosine = unit(patches) @ unit(embeddings).T  # (N, E)
    own = class_of_patch[:, None] == class_of_embedding[None]
    return np.where(own, cosine, -np.inf).max(axis=1)


def movement_of(result: Segmentation) -> Movement:
    """Measure what the decoder of a result did.

    Args:
        result: segmented with `features=True`.

    Raises:
        LdvcError: the result holds no features.
    """
    windows = result.features
    groups = np.asarray(result.embedding_classes)
    labels = result.patch_labels
    patches = [[unit(each.patches_before), unit(each.patches_after)] for each in windows]
    embeddings = [[unit(each.classes_before), unit(each.classes_after)] for each in windows]
    similarity = [
        [similarity_to_class(patches[i][moment], embeddings[i][moment], labels[i], groups) for i in range(len(windows))]
        for moment in (0, 1)
    ]
    return Movement(
        patches_before=np.concatenate([before for before, _ in patches]),
        patches_after=np.concatenate([after for _, after in patches]),
        embeddings_before=np.mean([before for before, _ in embeddings], axis=0),
        embeddings_after=np.mean([after for _, after in embeddings], axis=0),
        class_of_embedding=groups,
        class_of_patch=np.concatenate(labels),
        embedding_drift=np.mean([cosine_distance(*pair) for pair in embeddings], axis=0),
        patch_drift=np.concatenate([cosine_distance(*pair) for pair in patches]),
        similarity_before=np.concatenate(similarity[0]),
        similarity_after=np.concatenate(similarity[1]),
    )


@dataclass(frozen=True)
class Plane:
    """The plane of the two largest principal components.

    Attributes:
        mean: (d,).
        axes: (2, d), orthonormal; the sign of each makes its largest element positive, so that pictures do not flip.
        explained: share of the variance along each axis, two numbers in 0..1.
    """

    mean: np.ndarray
    axes: np.ndarray
    explained: tuple[float, float]

    def project(self, points: np.ndarray) -> np.ndarray:
        """(n, d) -> (n, 2)."""
        return (points - self.mean) @ self.axes.T


def fit_plane(points: np.ndarray) -> Plane:
    """Principal component analysis of (n, d) points by the eigenvectors of their covariance.

    With fewer than two directions in which the points differ, an axis is arbitrary and explains nothing.
    """
    points = np.asarray(points, dtype=np.float64)
    mean = points.mean(axis=0)
    centred = points - mean
    variance, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    variance = variance.clip(min=0)
    axes = vectors[:, [-1, -2]].T
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)])[:, None]
    total = variance.sum()
    shares = variance[[-1, -2]] / total if total > 0 else np.zeros(2)
    return Plane(mean=mean, axes=axes, explained=(float(shares[0]), float(shares[1])))


@dataclass(frozen=True)
class DecoderSpace:
    """One decoder in the plane: (N, 2) and (E, 2) coordinates, beside what was measured in all d dimensions."""

    patches_before: np.ndarray
    patches_after: np.ndarray
    embeddings_before: np.ndarray
    embeddings_after: np.ndarray
    movement: Movement

    @property
    def drift(self) -> dict[str, float]:
        """Mean cosine distance moved, of "classes" and of "patches"."""
        return {
            "classes": float(self.movement.embedding_drift.mean()),
            "patches": float(self.movement.patch_drift.mean()),
        }

    @property
    def similarity(self) -> dict[str, float]:
        """Mean cosine of a patch and its class, "before" and "after"."""
        return {
            "before": float(self.movement.similarity_before.mean()),
            "after": float(self.movement.similarity_after.mean()),
        }


@dataclass(frozen=True)
class Space:
    """Several decoders in one plane."""

    plane: Plane
    decoders: dict[str, DecoderSpace]

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, low, right, high) of all points of all decoders."""
        points = np.concatenate(
            [
                part
                for decoder in self.decoders.values()
                for part in (decoder.patches_before, decoder.patches_after, decoder.embeddings_before, decoder.embeddings_after)
            ]
        )
        return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def shared_space(movements: Mapping[str, Movement]) -> Space:
    """Project the movements of several decoders into the plane of one analysis of all their points, each counting once."""
    parts = ("patches_before", "patches_after", "embeddings_before", "embeddings_after")
    plane = fit_plane(np.concatenate([getattr(each, part) for each in movements.values() for part in parts]))
    return Space(
        plane=plane,
        decoders={
            decoder: DecoderSpace(*(plane.project(getattr(movement, part)) for part in parts), movement)
            for decoder, movement in movements.items()
        },
    )
