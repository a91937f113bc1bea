"""The space of patches and names before and after a decoder: distances, and the plane against numpy's SVD."""

import numpy as np
import pytest
from torch.nn.functional import cosine_similarity

from ldvc.embedding_space import POINTS, cosine_distance, fit_plane, movement_of, shared_space, unit
from ldvc.errors import LdvcError
from ldvc.predictor import Predictor
from tests.results import random_photo

NAMES = ["dog", "grass", "zebra"]


@pytest.fixture(scope="module")
def results(tiny_predictor: Predictor) -> dict:
    options = {"image": tiny_predictor.encode_image(random_photo()), "features": True}
    return {decoder: tiny_predictor.sibling(decoder).segment(NAMES, **options) for decoder in ("ldvc", "zegclip")}


def test_cosine_distance_by_hand() -> None:
    first = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.3, 0.7]])
    second = np.array([[0.0, 5.0], [7.0, 0.0], [-1.0, -1.0], [0.3, 0.7]])
    assert np.allclose(cosine_distance(first, second), [1, 0, 2, 0])
    assert cosine_distance(first, first).tolist() == [0, 0, 0, 0]


def test_plane_is_that_of_numpys_svd() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(200, 6)) * [5, 3, 1, 0.5, 0.2, 0.1] + 4
    plane = fit_plane(points)
    centred = points - points.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(plane.explained, (singular**2 / (singular**2).sum())[:2])
    for own, reference in zip(plane.axes, rows[:2], strict=True):
        assert abs(own @ reference) == pytest.approx(1)
        assert own[np.abs(own).argmax()] > 0  # the sign is the same on every machine
    assert np.allclose(np.abs(plane.project(points)), np.abs(centred @ rows[:2].T))
    same = fit_plane(np.ones((4, 3)))
    assert same.explained == (0, 0) and np.allclose(same.project(np.ones((4, 3))), 0)
    line = fit_plane(np.outer(np.arange(5.0), [1, 1, 0]))
    assert line.explained == pytest.approx((1, 0)) and np.isfinite(line.axes).all()


def test_ldvc_keeps_the_names_and_zegclip_the_patches(results: dict) -> None:
    """Against `torch.nn.functional.cosine_similarity`."""
    for decoder, result in results.items():
        (features,) = result.features
        found = movement_of(result)
        count = result.grid[0] * result.grid[1]
        assert found.patches_after.shape == (count, 32) and found.embeddings_after.shape == (3, 32)
        names = cosine_similarity(features.classes_before.double(), features.classes_after.double())
        patches = cosine_similarity(features.patches_before.double(), features.patches_after.double())
        assert np.allclose(found.embedding_drift, 1 - names, atol=1e-9)
        assert np.allclose(found.patch_drift, 1 - patches, atol=1e-9)
        similarity = cosine_similarity(features.patches_after, features.classes_after[result.patch_labels[0]])
        assert np.allclose(found.similarity_after, similarity, atol=1e-5)
        moved, still = ("patches", "classes") if decoder == "ldvc" else ("classes", "patches")
        drift = shared_space({decoder: found}).decoders[decoder].drift
        assert drift[still] == 0 and drift[moved] > 1e-4, decoder


def test_both_decoders_share_one_plane(results: dict) -> None:
    movements = {decoder: movement_of(result) for decoder, result in results.items()}
    space = shared_space(movements)
    everything = np.concatenate([getattr(each, part) for each in movements.values() for part in POINTS])
    assert np.allclose(space.plane.mean, everything.mean(axis=0))
    for decoder, movement in movements.items():
        assert np.allclose(space.decoders[decoder].patches_after, space.plane.project(movement.patches_after))
    projected = space.plane.project(everything)
    assert space.bounds == pytest.approx((*projected.min(axis=0), *projected.max(axis=0)))


def test_several_windows_and_synonyms(tiny_predictor: Predictor) -> None:
    """Patches of all windows count; embeddings are averaged over windows; of synonyms, the closest counts."""
    settings = {"inference": {"short_side": 64, "window": 64, "stride": 48}}
    zegclip = Predictor(tiny_predictor.sibling("zegclip").model, settings, device="cpu")
    result = zegclip.segment(NAMES, image=zegclip.encode_image(random_photo(64, 128)), features=True)
    found = movement_of(result)
    assert len(result.features) == 3 and len(found.patches_before) == 3 * 16 == len(found.class_of_patch)
    by_hand = np.mean([cosine_distance(each.classes_before, each.classes_after) for each in result.features], axis=0)
    assert np.allclose(found.embedding_drift, by_hand)

    result = zegclip.segment("sofa | couch, grass", image=zegclip.encode_image(random_photo(64, 64)), features=True)
    found, (features,) = movement_of(result), result.features
    assert found.class_of_embedding.tolist() == [0, 0, 1] and len(found.embedding_drift) == 3
    cosine = unit(features.patches_after) @ unit(features.classes_after).T
    expected = np.where(result.patch_labels[0] == 0, cosine[:, :2].max(axis=1), cosine[:, 2])
    assert np.allclose(found.similarity_after, expected)


def test_features_are_only_kept_on_request(tiny_predictor: Predictor) -> None:
    image = tiny_predictor.encode_image(random_photo(64, 64))
    plain = tiny_predictor.sibling("clip").segment(NAMES, image=image, features=True)
    for result in (tiny_predictor.segment(NAMES, image=image), plain):
        with pytest.raises(LdvcError, match="features=True"):
            movement_of(result)
