"""What a segmentation found: label map, score maps, attention and routing, at any size.

The decoder's maps have one value per patch, of one or several windows of the photo. They are kept that small; label and
score maps are upsampled from them to the size that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ldvc.calibration import Calibration
from ldvc.errors import LdvcError
from ldvc.inference import Axis, Window, stitch, upsample, upsampled_argmax
from ldvc.modeling.attention import Routing
from ldvc.patch_routing import PatchRouting, distance_to_centre, patch_routing

CHUNK = 32_000_000  # values of score maps that are worked on at once


@dataclass(frozen=True)
class DecoderFeatures:
    """What went into the decoder and what came out, of one window; d is CLIP's joint width.

    Attributes:
        patches_before, patches_after: (N, d), float32.
        classes_before, classes_after: (E, d), float32, one for each word (a class may have several, see
            `Segmentation.embedding_classes`); before is what the text adapter made of the words for this photo.
    """

    patches_before: Tensor
    patches_after: Tensor
    classes_before: Tensor
    classes_after: Tensor


@dataclass
class WindowOutput:
    """What the decoder returned for one window.

    Attributes:
        window: where it is on the input_size.
        logits: (C, h, w), one value per patch, padding included.
        attention_scores: for each layer (heads, E, h, w), scores of cross-attention before the softmax: the E words of the
            classes, class by class, then the words of `Segmentation.company`.
        routing: for each layer; empty without LCSA.
        features: before and after the decoder, or None if not asked for.
    """

    window: Window
    logits: Tensor
    attention_scores: list[Tensor] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    features: DecoderFeatures | None = None


class Segmentation:
    """The answer to `Predictor.segment`.

    One rule: the label of a pixel is the name with the highest score, and -1 ("none of these") where that score is below
    `background`.

    Attributes:
        names: the class names; label i means names[i]. Of synonyms, the first.
        synonyms: for each class its words; one, mostly.
        seen: for each name, whether the checkpoint saw masks of it in training.
        indistinguishable_words: groups of words that the model cannot tell apart; which of their classes a pixel gets
            means nothing.
        decoder: which decoder answered.
        picture: uint8 (H, W, 3), the photo.
        background: threshold of "none of these", or None. May be set anew: label maps follow.
        company: words that the patches may attend to besides the names; they are no classes.
        grid: (h, w), patches of the whole photo; the size of attention maps.
    """

    def __init__(
        self,
        *,
        names: list[str],
        seen: list[bool],
        decoder: str,
        picture: np.ndarray,
        input_size: tuple[int, int],
        patch: int,
        outputs: list[WindowOutput],
        calibration: Calibration | None = None,
        background: float | None = None,
        synonyms: list[list[str]] | None = None,
        indistinguishable_words: list[list[str]] | None = None,
        company: list[str] | None = None,
    ) -> None:
        self.names = names
        self.synonyms = [[name] for name in names] if synonyms is None else synonyms
        self.seen = seen
        self.indistinguishable_words = indistinguishable_words or []
        self.company = company or []
        self.decoder = decoder
        self.picture = picture
        self.background = background
        self.grid = (-(-input_size[0] // patch), -(-input_size[1] // patch))
        self._input_size = input_size
        self._patch = patch
        self._outputs = outputs
        self._calibration = calibration or Calibration()
        self._last_best: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the photo."""
        return self.picture.shape[0], self.picture.shape[1]

    @property
    def labels(self) -> np.ndarray:
        """int64 (H, W): index into `names`, -1 = none of these."""
        return self.labels_at(self.size)

    @cached_property
    def scores(self) -> np.ndarray:
        """float32 (C, H, W) in 0..1. Big photos and long lists need much memory; `scores_at` makes smaller maps."""
        return self.scores_at(self.size)

    def labels_at(self, size: tuple[int, int]) -> np.ndarray:
        """Label map (height, width) at another size of the same photo."""
        names, scores = self.best_at(size)
        return names if self.background is None else np.where(scores < self.background, -1, names)

    def best_at(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The best name of each pixel, whatever the threshold, int64 (height, width), and its score, float32."""
        best, names = self._best_at(size)
        return names.numpy(), self._score(best).numpy()

    def scores_at(self, size: tuple[int, int], index: int | None = None) -> np.ndarray:
        """Score maps (C, height, width) at another size of the same photo, or the one (height, width) of name `index`.

        Where two names have the same score after rounding to float32, the one with the lower logit gets the next smaller
        number, so that the argmax of the scores is the label.
        """
        best, names = self._best_at(size)
        score = self._score(best)
        below = torch.nextafter(score, torch.zeros(()))
        chosen = range(len(self.names)) if index is None else [index]
        maps = torch.empty(len(chosen), *size)
        for place, values in self._maps(size, chosen):
            part = maps[place : place + len(values)]
            part.copy_(self._score(values))
            wins = names == torch.tensor(chosen[place : place + len(values)])[:, None, None]
            torch.where(wins, score, torch.minimum(part, below), out=part)
        return maps.numpy() if index is None else maps[0].numpy()

    def area_shares(self, labels: np.ndarray) -> list[float]:
        """Share of the photo that each name covers in a label map; what remains is none of these."""
        counts = np.bincount(labels.ravel() + 1, minlength=len(self.names) + 1)[1:]
        return (counts / max(labels.size, 1)).tolist()

    @property
    def patch(self) -> int:
        """Side of a patch in pixels of the input_size, in which windows are given."""
        return self._patch

    @property
    def extent(self) -> tuple[float, float]:
        """(height, width) of the photo in patches; less than `grid` where the last patches are partly padding."""
        return self._input_size[0] / self._patch, self._input_size[1] / self._patch

    def patch_scores(self, y: int, x: int) -> np.ndarray:
        """Scores (C,) in 0..1 of the patch in row `y`, column `x` of `grid`."""
        return self._score(self._patch_values(y, x)).numpy()

    def patch_label(self, y: int, x: int) -> int:
        """Index of the name that fits that patch best, whatever the threshold."""
        return int(self._patch_values(y, x).argmax())

    @property
    def attention_shape(self) -> tuple[int, int]:
        """(layers, heads) that `cross_attention` may be asked for; (0, 0) if this result has no attention."""
        layers = self._outputs[0].attention_scores
        return len(layers), len(layers[0]) if layers else 0

    def cross_attention(self, layer: int = -1, head: int | None = None) -> np.ndarray:
        """How much of each patch's attention goes to each name: the softmax over the names of a head's scores.

        Synonyms add up. With `company`, the softmax runs over names and company together, see `company_attention`.

        Args:
            layer: of the decoder. The scores of the last one, averaged over heads, are the mask logits without their bias.
            head: None = the softmax of the scores' mean over heads.

        Returns:
            float32 (C, h, w), summing to 1 over the names (and company). With one name and no company it is 1 everywhere.

        Raises:
            LdvcError: this result has no attention (plain similarity, or `attention=False`).
        """
        return self._attention(layer, head)[:-1].numpy()

    def company_attention(self, layer: int = -1, head: int | None = None) -> np.ndarray:
        """The attention (h, w) that goes to the words of `company`, taken together; arguments as of `cross_attention`."""
        return self._attention(layer, head)[-1].numpy()

    def _attention(self, layer: int, head: int | None) -> Tensor:
        """(C + 1, h, w): classes, then company."""
        if not self._outputs[0].attention_scores:
            raise LdvcError(
                "This result holds no attention: segment with attention=True and a decoder other than plain similarity."
            )
        owner = torch.tensor(self.embedding_classes + [len(self.names)] * len(self.company))
        maps = []
        for output in self._outputs:
            scores = output.attention_scores[layer]  # (heads, E, h, w)
            weights = (scores.mean(dim=0) if head is None else scores[head]).softmax(dim=0)
            maps.append(weights.new_zeros(len(self.names) + 1, *weights.shape[1:]).index_add_(0, owner, weights))
        return maps[0] if len(maps) == 1 else self._stitch(maps, self.grid, grid=True)

    @property
    def has_routing(self) -> bool:
        """Whether `routing` has an answer."""
        return bool(self._outputs[0].routing)

    def routing(self, y: int, x: int, layer: int = -1) -> PatchRouting:
        """Where the patch in row `y`, column `x` of `grid` was routed by LCSA (see `patch_at` for photo pixels).

        Raises:
            LdvcError: this decoder has no LCSA, or the result was made with attention=False.
        """
        if not self._outputs[0].routing:
            raise LdvcError("This result holds no routing: segment with attention=True and the decoder 'ldvc'.")
        assert 0 <= y < self.grid[0] and 0 <= x < self.grid[1], f"patch ({y}, {x}) is not in the grid {self.grid}"
        at = ((y + 0.5) * self._patch, (x + 0.5) * self._patch)  # on the input_size
        output = min(self._outputs, key=lambda each: distance_to_centre(each.window, at))
        grid = tuple(output.logits.shape[-2:])
        row = min(max(int((at[0] - output.window.top) // self._patch), 0), grid[0] - 1)
        column = min(max(int((at[1] - output.window.left) // self._patch), 0), grid[1] - 1)
        return patch_routing(output.routing[layer], row=row, column=column, grid=grid, window=output.window)

    @property
    def features(self) -> list[DecoderFeatures]:
        """Patch features and class embeddings before and after the decoder, window by window.

        Raises:
            LdvcError: this result has none (plain similarity, or `features=False`).
        """
        if self._outputs[0].features is None:
            raise LdvcError("This result holds no features: segment with features=True and a decoder that has a decoder.")
        return [output.features for output in self._outputs]

    @property
    def embedding_classes(self) -> list[int]:
        """For each class embedding of `features`, the index of its class: the words of `synonyms`, class by class."""
        return [index for index, words in enumerate(self.synonyms) for _ in words]

    @property
    def patch_labels(self) -> list[np.ndarray]:
        """The best name of each patch, window by window: (N,) indices into `names`; `background` plays no part."""
        return [each.argmax(dim=0).flatten().numpy() for each in self._calibrated]

    def patch_at(self, y: float, x: float) -> tuple[int, int]:
        """(row, column) of the patch that holds the photo's pixel (y, x)."""
        height, width = self.size
        row = int(y * self._input_size[0] / height // self._patch)
        column = int(x * self._input_size[1] / width // self._patch)
        return min(max(row, 0), self.grid[0] - 1), min(max(column, 0), self.grid[1] - 1)

    def attention_at(self, attention: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Enlarge maps on `grid` (..., h, w) to a size of the photo, the padding of the last patches cut off."""
        maps = torch.from_numpy(np.ascontiguousarray(attention, dtype=np.float32))
        rows, columns = (
            Axis.of(size[axis], input_size=self._input_size[axis], start=0, cells=self.grid[axis], patch=self._patch)
            for axis in (0, 1)
        )
        return upsample(maps.reshape(-1, *self.grid), rows, columns).reshape(*maps.shape[:-2], *size).numpy()

    # ---- from patches to pixels -----------------------------------------------------------------------------------

    @property
    def _averages_scores(self) -> bool:
        """Several windows are averaged after the sigmoid, as in the evaluation protocol."""
        return len(self._outputs) > 1

    @cached_property
    def _calibrated(self) -> list[Tensor]:
        return [self._calibration(output.logits) for output in self._outputs]

    def _score(self, values: Tensor) -> Tensor:
        """float32 scores of what `_maps` and `_best_at` return, above 0 so that there is a lower score (see `scores_at`)."""
        scores = values.float() if self._averages_scores else torch.sigmoid(values)
        return scores.clamp_(min=torch.finfo(torch.float32).tiny)

    def _patch_values(self, y: int, x: int) -> Tensor:
        """(C,) what `_maps` has, of one patch."""
        after = torch.sigmoid if self._averages_scores else None
        return self._stitch(self._calibrated, self.grid, after=after, grid=True)[:, y, x]

    def _best_at(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of each pixel (height, width) the highest of `_maps`, and the index of its name; kept for the last size, which score
        maps ask for name by name."""
        last = self._last_best
        if last is None or last[0] != tuple(size):
            last = self._last_best = (tuple(size), self._compute_best(size))
        return last[1]

    def _compute_best(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if not self._averages_scores:
            window = self._outputs[0].window
            return upsampled_argmax(
                self._calibrated[0], size, input_size=self._input_size, window=window, patch=self._patch
            )
        best = torch.full(size, -torch.inf, dtype=torch.float64)
        labels = torch.zeros(size, dtype=torch.int64)
        for start, values in self._maps(size, range(len(self.names))):
            top, index = values.max(dim=0)
            labels = torch.where(top > best, index + start, labels)
            best = torch.maximum(best, top)
        return best, labels

    def _maps(self, size: tuple[int, int], names: range | list[int]) -> Iterator[tuple[int, Tensor]]:
        """A few names at a time: the place of the first in `names`, and (n, height, width) logits of scores, float32; of
        several windows the averaged scores, float64, in which logits up to 36 can be told apart."""
        step = max(1, CHUNK // max(size[0] * size[1], 1))
        after = torch.sigmoid if self._averages_scores else None
        for start in range(0, len(names), step):
            chosen = slice(names[start], names[min(start + step, len(names)) - 1] + 1)
            yield start, self._stitch([each[chosen] for each in self._calibrated], size, after=after)

    def _stitch(self, maps: list[Tensor], size: tuple[int, int], **options) -> Tensor:
        """`stitch` for the windows of this photo."""
        windows = [output.window for output in self._outputs]
        return stitch(maps, windows, size, input_size=self._input_size, patch=self._patch, **options)
