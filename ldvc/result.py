"""What a segmentation found: label map, score maps, attention and routing, at any size.

The decoder's maps have one value per patch, of one or several windows of the photo. They are kept that small; label and
score maps are drawn from them at the size that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ldvc.calibration import Calibration
from ldvc.enlarge import best_of, resampling_matrix
from ldvc.errors import LdvcError
from ldvc.windows import (
    DecoderFeatures,
    PatchRouting,
    WindowOutput,
    distance_to_centre,
    patch_routing,
    stitch,
)

CHUNK = 32_000_000  # values of score maps that are worked on at once


class Segmentation:
    """The answer to `Predictor.segment`.

    Attributes:
        names: the class names; label i means names[i]. Of synonyms, the first.
        synonyms: for each class its words; one, mostly.
        seen: for each name, whether the checkpoint saw masks of it in training.
        alike: groups of words that the model cannot tell apart; which of their classes a pixel gets means nothing.
        arm: which arm answered.
        picture: uint8 (H, W, 3), the photo.
        background: threshold of "none of these", or None. May be set anew: label maps follow.
        grid: (h, w), patches of the whole photo; the size of attention maps.
    """

    def __init__(
        self,
        *,
        names: list[str],
        seen: list[bool],
        arm: str,
        picture: np.ndarray,
        canvas: tuple[int, int],
        patch: int,
        outputs: list[WindowOutput],
        calibration: Calibration | None = None,
        background: float | None = None,
        synonyms: list[list[str]] | None = None,
        alike: list[list[str]] | None = None,
    ) -> None:
        self.names = names
        self.synonyms = [[name] for name in names] if synonyms is None else synonyms
        self.seen = seen
        self.alike = alike or []
        self.arm = arm
        self.picture = picture
        self.background = background
        self.grid = (-(-canvas[0] // patch), -(-canvas[1] // patch))
        self._canvas = canvas
        self._patch = patch
        self._outputs = outputs
        self._calibration = calibration or Calibration()

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the photo."""
        return self.picture.shape[0], self.picture.shape[1]

    @property
    def labels(self) -> np.ndarray:
        """int (H, W): index into `names`, -1 = none of these."""
        return self.labels_at(self.size)

    @cached_property
    def scores(self) -> np.ndarray:
        """float32 (C, H, W) in 0..1. Big photos and long lists need much memory; `scores_at` draws smaller maps."""
        return self.scores_at(self.size)

    def labels_at(self, size: tuple[int, int]) -> np.ndarray:
        """Label map (height, width) at another size of the same photo."""
        return self.labels_with_best(size)[0]

    def labels_with_best(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Label map at a size, and what it would be if every pixel had to be one of the names."""
        best, names = self._best_at(size)
        if self.background is None:
            return names.numpy(), names.numpy()
        return torch.where(self._score_of(best, names) < self.background, -1, names).numpy(), names.numpy()

    def best_scores_at(self, size: tuple[int, int]) -> np.ndarray:
        """The score (height, width) of the best name of each pixel: what `background` is compared with."""
        return self._score_of(*self._best_at(size)).numpy()

    def scores_at(self, size: tuple[int, int], index: int | None = None) -> np.ndarray:
        """Score maps (C, height, width) at another size of the same photo, or the one (height, width) of name `index`."""
        if index is not None:
            return self._maps(size, slice(index, index + 1))[0].numpy()
        return torch.cat([scores for _, scores in self._chunks(size)]).numpy()

    def area_shares(self, labels: np.ndarray) -> list[float]:
        """Share of the photo that each name covers in a label map; what remains is none of these."""
        counts = np.bincount(labels.ravel() + 1, minlength=len(self.names) + 1)[1:]
        return (counts / max(labels.size, 1)).tolist()

    @property
    def patch(self) -> int:
        """Side of a patch in pixels of the canvas, in which windows are given."""
        return self._patch

    @property
    def extent(self) -> tuple[float, float]:
        """(height, width) of the photo in patches; less than `grid` where the last patches are partly padding."""
        return self._canvas[0] / self._patch, self._canvas[1] / self._patch

    def patch_scores(self, y: int, x: int) -> np.ndarray:
        """Scores (C,) in 0..1 of the patch in row `y`, column `x` of `grid`."""
        maps = self._stitch(self._scored, self.grid, after=torch.sigmoid, grid=True)[:, y, x]
        return (maps if self._averages_scores else torch.sigmoid(maps)).numpy()

    def patch_label(self, y: int, x: int) -> int:
        """Index of the name that fits that patch best, whatever the threshold; as for labels, scores alone do not decide."""
        if self._averages_scores:
            return int(self.patch_scores(y, x).argmax())
        return int(self._stitch(self._compared, self.grid, grid=True)[:, y, x].argmax())

    @property
    def attention_shape(self) -> tuple[int, int]:
        """(layers, heads) that `cross_attention` may be asked for; (0, 0) if this result has no attention."""
        layers = self._outputs[0].cross_attention
        return len(layers), len(layers[0]) if layers else 0

    def cross_attention(self, layer: int = -1, head: int | None = None) -> np.ndarray:
        """How much of each patch's attention goes to each name.

        Args:
            layer: of the decoder.
            head: None = mean of all heads.

        Returns:
            float32 (C, h, w), summing to 1 over the names. With one name it is 1 everywhere.

        Raises:
            LdvcError: this result has no attention (plain similarity, or `attention=False`).
        """
        if not self._outputs[0].cross_attention:
            raise LdvcError(
                "This result holds no attention: segment with attention=True and an arm that has a decoder."
            )
        layers = [output.cross_attention[layer] for output in self._outputs]
        maps = [weights.mean(dim=0) if head is None else weights[head] for weights in layers]
        if len(maps) == 1:
            return maps[0].numpy()
        return self._stitch(maps, self.grid, grid=True).numpy()

    @property
    def has_routing(self) -> bool:
        """Whether `routing` has an answer."""
        return bool(self._outputs[0].routing)

    def routing(self, y: int, x: int, layer: int = -1) -> PatchRouting:
        """Where the patch in row `y`, column `x` of `grid` was routed by LCSA (see `patch_at` for photo pixels).

        Raises:
            LdvcError: this arm has no LCSA, or the result was made with attention=False.
        """
        if not self._outputs[0].routing:
            raise LdvcError("This result holds no routing: segment with attention=True and the arm 'ldvc'.")
        assert 0 <= y < self.grid[0] and 0 <= x < self.grid[1], f"patch ({y}, {x}) is not in the grid {self.grid}"
        at = ((y + 0.5) * self._patch, (x + 0.5) * self._patch)  # on the canvas
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
            raise LdvcError("This result holds no features: segment with features=True and an arm that has a decoder.")
        return [output.features for output in self._outputs]

    @property
    def embedding_classes(self) -> list[int]:
        """For each class embedding of `features`, the index of its class: the words of `synonyms`, class by class."""
        return [index for index, words in enumerate(self.synonyms) for _ in words]

    @property
    def patch_labels(self) -> list[np.ndarray]:
        """The best name of each patch, window by window: (N,) indices into `names`; `background` plays no part.

        Decided as labels are, so that a patch belongs to the class that the picture shows there.
        """
        evidence = self._scored if self._averages_scores else self._compared
        return [each.argmax(dim=0).flatten().numpy() for each in evidence]

    def patch_at(self, y: float, x: float) -> tuple[int, int]:
        """(row, column) of the patch that holds the photo's pixel (y, x)."""
        height, width = self.size
        row = int(y * self._canvas[0] / height // self._patch)
        column = int(x * self._canvas[1] / width // self._patch)
        return min(max(row, 0), self.grid[0] - 1), min(max(column, 0), self.grid[1] - 1)

    def attention_at(self, attention: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Enlarge maps on `grid` (..., h, w) to a size of the photo, the padding of the last patches cut off."""
        maps = torch.from_numpy(np.ascontiguousarray(attention, dtype=np.float32))
        rows, columns = (
            resampling_matrix(size[axis], canvas=self._canvas[axis], start=0, cells=self.grid[axis], patch=self._patch)[
                0
            ]
            for axis in (0, 1)
        )
        return (rows @ maps @ columns.T).numpy()

    # ---- from patches to pixels -----------------------------------------------------------------------------------

    @property
    def _averages_scores(self) -> bool:
        """Several windows are averaged after the sigmoid, as in the evaluation protocol."""
        return len(self._outputs) > 1

    def _best_at(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of each pixel (height, width) the highest evidence, in the sense of `_maps`, and the index of its name."""
        if not self._averages_scores:
            window = self._outputs[0].window
            return best_of(self._compared[0], size, canvas=self._canvas, window=window, patch=self._patch)
        best = torch.full(size, -torch.inf)
        labels = torch.zeros(size, dtype=torch.int64)
        for start, evidence in self._chunks(size, as_scores=False):
            top, index = evidence.max(dim=0)
            labels = torch.where(top > best, index + start, labels)
            best = torch.maximum(best, top)
        return best, labels

    def _chunks(self, size: tuple[int, int], *, as_scores: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Maps of a few names at a time: (index of the first, (names, height, width)); arguments as of `_maps`."""
        step = max(1, CHUNK // max(size[0] * size[1], 1))
        for start in range(0, len(self.names), step):
            yield start, self._maps(size, slice(start, start + step), as_scores=as_scores)

    def _maps(self, size: tuple[int, int], names: slice, *, as_scores: bool = True) -> Tensor:
        """(names, height, width): scores in 0..1, or else what names are compared by, which never saturates.

        Averaged windows are scores in both cases.
        """
        logits = self._scored if as_scores or self._averages_scores else self._compared
        logits = [each[names] for each in logits]
        if self._averages_scores:
            return self._stitch(logits, size, after=torch.sigmoid)
        maps = self._stitch(logits, size)
        return torch.sigmoid(maps) if as_scores else maps

    @cached_property
    def _scored(self) -> list[Tensor]:
        return self._calibration.scored([output.logits for output in self._outputs])

    @cached_property
    def _compared(self) -> list[Tensor]:
        return self._calibration.compared([output.logits for output in self._outputs])

    @cached_property
    def _score_offset(self) -> Tensor:
        return self._calibration.score_offset([output.logits for output in self._outputs])

    def _score_of(self, best: Tensor, names: Tensor) -> Tensor:
        """Scores (height, width) of the best names, from what `_best_at` found."""
        if self._averages_scores:
            return best
        return torch.sigmoid(best + self._score_offset[names])

    def _stitch(
        self, maps: list[Tensor], size: tuple[int, int], *, after: Callable | None = None, grid: bool = False
    ) -> Tensor:
        """`stitch` for the windows of this photo."""
        windows = [output.window for output in self._outputs]
        return stitch(maps, windows, size, canvas=self._canvas, patch=self._patch, after=after, grid=grid)
