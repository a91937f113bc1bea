"""What the page does, as plain functions of values: no widgets here, so that tests need no browser."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldvc.class_names import clean_names, synonyms_of, without_none_words
from ldvc.errors import InvalidImageError, InvalidNamesError
from ldvc.image_io import load_picture
from ldvc.predictor import COMPANY, ImageState
from ldvc.result import Segmentation
from ldvc.web import texts
from ldvc.web.gpu import on_gpu
from ldvc.web.models import MAIN_DECODER, Catalogue, Models
from ldvc.web.session import OWN_THRESHOLD, Problem, Visit

PHOTO_SIDE = 1600  # photos are shrunk to this long side when they come in

LCSA_OFF = "ldvc_lcsa_off"  # not a decoder: LCSA left out of the same trained weights, an intervention


class Handlers:
    """The actions of the page.

    Args:
        catalogue: the checkpoints to choose from.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

        @on_gpu
        def run(model: str, function: Callable, arguments: tuple) -> Any:
            try:
                return function(catalogue.get(model), *arguments)
            except Problem as problem:
                return problem

        self._run = run

    def compute(self, visit: Visit, function: Callable, *arguments: Any) -> Any:
        """`function(models, *arguments)` with the models of the visit; every use of a model goes through here.

        ZeroGPU runs it in another process: the function must be of a module's top level, arguments and result are values
        that can be pickled, and what it changes in place does not come back.

        Raises:
            Problem: the function raised it.
        """
        found = self._run(visit.model, function, arguments)
        if isinstance(found, Problem):
            raise found
        return found

    def models(self, visit: Visit) -> Models:
        """The models of the visit, for what needs no computing: `decoders()`, `name`, `main.seen_names`."""
        return self.catalogue.get(visit.model)

    def segment(
        self,
        photo: str | None,
        names: str,
        background: float | str | None,
        visit: Visit,
        *,
        model: str | None = None,
    ) -> Visit:
        """Ask: segment a photo by names with LDVC, the other decoders when they are asked for.

        Args:
            photo: path of the uploaded file.
            names: separated by commas, or a list; synonyms by "|". "background" and the like are no classes: they allow "none
                of these" where `background` does not.
            background: see `Visit.background`.
            visit: what the visitor was looking at.
            model: key of the model choice; None = the visit's. A threshold was chosen for one checkpoint's scores: another
                one starts with its own.

        Returns:
            A new visit.

        Raises:
            Problem: the visitor can put it right. The visit that was given is unchanged.
        """
        key = model or visit.model or self.catalogue.default
        self.catalogue.get(key)
        if not photo:
            raise Problem("photo", texts.NO_PHOTO)
        asked, classes = cleaned_names(names)
        if visit.model not in ("", key) and background is not None:
            background = OWN_THRESHOLD
        try:
            fingerprint = hashlib.sha256(Path(photo).read_bytes()).hexdigest()
            known = visit.image is not None and (fingerprint, key) == (visit.fingerprint, visit.model)
            picture = visit.image if known else self.read_photo(photo)
        except OSError as error:
            raise Problem("photo", texts.NO_PHOTO) from error
        titles = [synonyms_of(name)[0] for name in classes]
        after = replace(
            visit,
            model=key,
            photo=photo,
            fingerprint=fingerprint,
            photo_name=Path(photo).name,
            asked=asked,
            names=titles,
            background=background,
            none_named=asked != classes,
            results={},
            chosen=visit.chosen if visit.chosen in titles else titles[0],
            version=visit.version + 1,
            drawn={},
            kept={},
            successor=None,
        )
        after.image, after.results = self.compute(after, answer, picture, asked, (MAIN_DECODER,), after.company)
        return after

    @staticmethod
    def read_photo(photo: str) -> np.ndarray:
        """(H, W, 3) uint8 pixels of an uploaded file, at most `PHOTO_SIDE` long.

        Raises:
            Problem: it is no picture that can be read.
        """
        try:
            return load_picture(photo, max_side=PHOTO_SIDE)
        except InvalidImageError as error:
            raise Problem("photo", str(error)) from error

    def results(self, visit: Visit, *decoders: str) -> list[Segmentation | None]:
        """Segmentations of the visit's question by some decoders, computed when first asked for and kept in the visit.

        The photo is never encoded again. All decoders that are missing are computed in one call.

        Args:
            visit: not empty.
            decoders: of `PREDICTOR_DECODERS`, or `LCSA_OFF`.

        Returns:
            One for each decoder; None where the checkpoint has no such decoder.
        """
        kept = visit.results
        missing = tuple(decoder for decoder in decoders if decoder not in kept)
        if missing:
            visit.image, found = self.compute(visit, answer, visit.image, visit.asked, missing, visit.company)
            kept.update(found)
        results = [kept[decoder] for decoder in decoders]
        for decoder, result in zip(decoders, results, strict=True):
            if result is not None:
                result.background = self.threshold(visit, decoder)
        return results

    def threshold(self, visit: Visit, decoder: str = MAIN_DECODER) -> float | None:
        """The threshold of "none of these" of the visit's answer by a decoder, or None: not allowed."""
        if visit.threshold != OWN_THRESHOLD:
            return visit.threshold
        predictor = self.models(visit).other(MAIN_DECODER if decoder == LCSA_OFF else decoder)
        return predictor.calibration.threshold

    def rethreshold(self, background: float | None, visit: Visit) -> bool:
        """Set another threshold of "none of these" (None = do not allow it), in place; no model computes anything.

        The threshold of LDVC's checkpoint is its own: then every decoder has its own.

        Returns:
            False if there is nothing to draw anew.
        """
        if visit.empty:
            return False
        if background is not None:
            background = min(max(float(background), 0.0), 1.0)
            if background == self.models(visit).main.calibration.threshold:
                background = OWN_THRESHOLD
        if background == visit.threshold:
            return False
        visit.background, visit.none_named = background, False
        visit.version += 1
        return True

    @staticmethod
    def keep_company(company: bool, visit: Visit) -> bool:
        """Ask single names with company (see `Visit.company`) or without, in place; results are computed when asked for.

        Returns:
            False if there is nothing to draw anew.
        """
        if company == visit.company:
            return False
        visit.company = company
        if visit.empty or len(visit.names) > 1:
            return False
        visit.results = {}
        visit.version += 1
        return True

    @staticmethod
    def choose(name: str, visit: Visit) -> bool:
        """Choose the class that the tabs show, in place; False if it is not among the visit's names."""
        if visit.empty or name not in visit.names:
            return False
        visit.chosen = name
        return True


def answer(
    models: Models, image: ImageState | np.ndarray, names: list[str], decoders: tuple[str, ...], company: bool
) -> tuple[ImageState, dict[str, Segmentation | None]]:
    """Segmentations by some decoders, and the photo's state with what they kept in it; see `Handlers.compute`."""
    state = image if isinstance(image, ImageState) else models.main.encode_image(image)
    found: dict[str, Segmentation | None] = {}
    for decoder in decoders:
        predictor = models.other(MAIN_DECODER if decoder == LCSA_OFF else decoder)
        found[decoder] = None
        if predictor is not None:
            found[decoder] = predictor.segment(
                names,
                image=state,
                company=COMPANY if company else (),
                features=True,
                skip_lcsa=decoder == LCSA_OFF,
            )
    return state, found


def weights_digest(models: Models, decoder: str) -> str:
    """See `Predictor.weights_digest`; for `Handlers.compute`."""
    return models.other(decoder).weights_digest


def cleaned_names(names: Any) -> tuple[list[str], list[str]]:
    """Cleaned names, from one text or from a program's list of texts, and those of them that are classes.

    Raises:
        Problem: no class, or too many names, or one too long, or something else than text.
    """
    if not isinstance(names or "", str | list | tuple):
        raise Problem("names", texts.NO_NAMES.format(value=names))
    try:
        asked = clean_names(names or "")
        classes, _ = without_none_words(asked)
    except InvalidNamesError as error:
        raise Problem("names", str(error)) from error
    return asked, classes


def checked_background(use_background: Any, threshold: Any) -> float | str | None:
    """What a program says about "none of these", as `Visit.background`.

    Args:
        use_background: whether it is allowed; None counts as no.
        threshold: score that a name must reach then; None = the checkpoint's own.

    Raises:
        Problem: `use_background` is not true or false, or the threshold is no number from 0 to 1.
    """
    if use_background not in (None, False, True):  # "no" would count as yes
        raise Problem("run", texts.NO_FLAG.format(value=use_background))
    if not use_background:
        return None
    if threshold is None:
        return OWN_THRESHOLD
    try:
        value = float(threshold)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise Problem("run", texts.NO_THRESHOLD.format(value=threshold))
    return value
