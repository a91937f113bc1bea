"""What the page does, as plain functions of values: no widgets here, so that tests need no browser."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldvc.errors import InvalidImageError, InvalidNamesError
from ldvc.names import clean_names, synonyms_of
from ldvc.pictures import load_picture
from ldvc.predictor import ImageState
from ldvc.result import Segmentation
from ldvc.web import texts
from ldvc.web.gpu import on_gpu
from ldvc.web.models import MAIN_ARM, Catalogue, Models
from ldvc.web.visit import Problem, Visit

PHOTO_SIDE = 1600  # photos are shrunk to this long side when they come in

LCSA_OFF = "ldvc_lcsa_off"  # not an arm: LCSA left out of the same trained weights, an intervention


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
        """The models of the visit, for what needs no computing: `arms()`, `name`, `main.seen_names`."""
        return self.catalogue.get(visit.model)

    def segment(
        self,
        photo: str | None,
        names: str,
        use_background: bool,
        threshold: float,
        visit: Visit,
        *,
        model: str | None = None,
        add_context: bool = True,
    ) -> Visit:
        """Ask: segment a photo by names with LDVC, the other arms when they are asked for.

        Args:
            photo: path of the uploaded file.
            names: separated by commas, or a list; synonyms by "|".
            use_background: allow "none of these".
            threshold: score that a name must reach then.
            visit: what the visitor was looking at.
            model: key of the model choice; None = the visit's.
            add_context: give a single name the context word for company; `context_added` of the new visit says so.

        Returns:
            A new visit.

        Raises:
            Problem: the visitor can put it right. The visit that was given is unchanged.
        """
        key = model or visit.model or self.catalogue.default
        self.catalogue.get(key)
        if not photo:
            raise Problem("photo", texts.NO_PHOTO)
        if use_background not in (None, False, True):  # a program's "no" would count as yes
            raise Problem("run", texts.NO_FLAG.format(value=use_background))
        background = checked_threshold(threshold) if use_background else None
        cleaned = cleaned_names(names)
        context_added, declined = False, visit.context_declined
        if add_context:
            cleaned, context_added, declined = with_context(cleaned, visit)
        try:
            fingerprint = hashlib.sha256(Path(photo).read_bytes()).hexdigest()
            known = visit.image is not None and (fingerprint, key) == (visit.fingerprint, visit.model)
            picture = visit.image if known else self.read_photo(photo)
        except OSError as error:
            raise Problem("photo", texts.NO_PHOTO) from error
        titles = [synonyms_of(name)[0] for name in cleaned]
        after = replace(
            visit,
            model=key,
            photo=photo,
            fingerprint=fingerprint,
            photo_name=Path(photo).name,
            asked=cleaned,
            names=titles,
            background=background,
            results={},
            chosen=visit.chosen if visit.chosen in titles else titles[0],
            context_added=context_added,
            context_declined=declined,
            version=visit.version + 1,
            drawn={},
            kept={},
            successor=None,
        )
        after.image, after.results = self.compute(after, answer, picture, cleaned, (MAIN_ARM,))
        after.results[MAIN_ARM].background = after.background
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

    def results(self, visit: Visit, *arms: str) -> list[Segmentation | None]:
        """Segmentations of the visit's question by some arms, computed when first asked for and kept in the visit.

        The photo is never encoded again. All arms that are missing are computed in one call.

        Args:
            visit: not empty.
            arms: of `PREDICTOR_ARMS`, or `LCSA_OFF`.

        Returns:
            One for each arm; None where the checkpoint has no such arm.
        """
        missing = tuple(arm for arm in arms if arm not in visit.results)
        if missing:
            visit.image, found = self.compute(visit, answer, visit.image, visit.asked, missing)
            visit.results.update(found)
        results = [visit.results[arm] for arm in arms]
        for result in results:
            if result is not None:
                result.background = visit.background
        return results

    def remove_context(
        self, photo: str | None, names: str, use_background: bool, threshold: float, visit: Visit, **options: Any
    ) -> Visit:
        """Segment again without the context word that the page had added.

        Raises:
            Problem: as `segment`.
        """
        kept = [name for name in cleaned_names(names) if name.casefold() != texts.CONTEXT_WORD]
        if len(kept) == 1:
            visit = replace(visit, context_declined=kept[0].casefold())
        return self.segment(photo, ", ".join(kept), use_background, threshold, visit, **options)

    @staticmethod
    def rethreshold(background: float | None, visit: Visit) -> bool:
        """Set another threshold of "none of these" (None = do not allow it), in place; no model computes anything.

        Returns:
            False if there is nothing to draw anew.
        """
        if background is not None:
            background = min(max(float(background), 0.0), 1.0)
        if visit.empty or background == visit.background:
            return False
        visit.background = background
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
    models: Models, image: ImageState | np.ndarray, names: list[str], arms: tuple[str, ...]
) -> tuple[ImageState, dict[str, Segmentation | None]]:
    """Segmentations by some arms, and the photo's state with what they kept in it; see `Handlers.compute`."""
    state = image if isinstance(image, ImageState) else models.main.encode_image(image)
    found: dict[str, Segmentation | None] = {}
    for arm in arms:
        predictor = models.other(MAIN_ARM if arm == LCSA_OFF else arm)
        found[arm] = None
        if predictor is not None:
            found[arm] = predictor.segment(names, image=state, features=True, skip_lcsa=arm == LCSA_OFF)
    return state, found


def weights_digest(models: Models, arm: str) -> str:
    """See `Predictor.weights_digest`; for `Handlers.compute`."""
    return models.other(arm).weights_digest


def cleaned_names(names: Any) -> list[str]:
    """Names as they will be asked, from one text or from a program's list of texts.

    Raises:
        Problem: no name, or too many, or one too long, or something else than text.
    """
    if not isinstance(names or "", str | list | tuple):
        raise Problem("names", texts.NO_NAMES.format(value=names))
    try:
        return clean_names(names or "")
    except InvalidNamesError as error:
        raise Problem("names", str(error)) from error


def checked_threshold(value: Any) -> float:
    """A threshold from outside.

    Raises:
        Problem: it is no number from 0 to 1.
    """
    try:
        threshold = float(value)
    except (TypeError, ValueError):
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise Problem("run", texts.NO_THRESHOLD.format(value=value))
    return threshold


def with_context(names: list[str], visit: Visit) -> tuple[list[str], bool, str]:
    """Names, whether the context word was added, and the name for which it is declined from now on."""
    if len(names) > 1:
        return names, False, ""
    name = names[0].casefold()
    shown_last = [each.casefold() for each in visit.asked]
    # Whoever deletes the word from the list by hand and asks again has declined it, too.
    deleted = shown_last == [name, texts.CONTEXT_WORD]
    if name in (texts.CONTEXT_WORD, visit.context_declined) or deleted:
        return names, False, name
    return [*names, texts.CONTEXT_WORD], True, ""
