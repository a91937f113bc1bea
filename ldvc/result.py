"""The result of a segmentation: label map, score maps, attention and routing, at any size.

A decoder returns maps with one value per patch, for each window of the photo. The result keeps these small maps and
upsamples label and score maps from them on demand.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ldvc.calibration import Calibration, SoftmaxCalibration
from ldvc.class_names import ClassName
from ldvc.errors import LdvcError
from ldvc.inference import Window, axes, stitch, upsample, upsampled_argmax
from ldvc.window_output import Best, DecoderFeatures, PatchRouting, WindowOutput, attention_of_patch, patch_routing

CHUNK = 32_000_000  # values of score maps that are computed at once
SIZES_KEPT = 3  # see `Segmentation._best_at`
A_DECODER = "a decoder other than plain similarity"


@dataclass(kw_only=True, eq=False, repr=False)
class Segmentation:
    """The result of `Predictor.segment`.

    The label of a pixel is the class with the highest score, or -1 ("none of these") if that score is below the threshold of
    this class. `background` and `thresholds` may be changed; label maps follow.
    """

    classes: list[ClassName]  # the C classes; label i means classes[i]
    seen: list[bool]  # for each class, whether the checkpoint was trained on masks of it
    decoder: str  # name of the decoder
    picture: np.ndarray  # uint8 (H, W, 3), the photo
    input_size: tuple[int, int]  # (height, width) of the model's input, without padding
    patch: int  # side of a patch in input pixels
    outputs: list[WindowOutput]  # outputs of the decoder, one for each window
    calibration: Calibration | SoftmaxCalibration = Calibration()
    background: float | None = None  # threshold of "none of these"; None = every pixel gets its best name
    thresholds: dict[str, float] = field(default_factory=dict)  # by name, for classes with another threshold
    indistinguishable_words: list[list[str]] = field(default_factory=list)  # groups; within one, labels are arbitrary
    company: list[str] = field(default_factory=list)  # words that the patches may attend to besides the classes
    stuff: list[str] = field(default_factory=list)  # words for "none of these"; dense CLIP only
    _best: dict[tuple[int, int], Best] = field(default_factory=dict, init=False)  # by size; copies of a result share it

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), patches of the whole photo, padding included; the size of attention maps."""
        return -(-self.input_size[0] // self.patch), -(-self.input_size[1] // self.patch)

    @property
    def extent(self) -> tuple[float, float]:
        """(height, width) of the photo in patches; less than `grid` if the last patches are partly padding."""
        return self.input_size[0] / self.patch, self.input_size[1] / self.patch

    @property
    def names(self) -> list[str]:
        """The title of each class."""
        return [each.title for each in self.classes]

    @property
    def synonyms(self) -> list[list[str]]:
        """All words of each class."""
        return [list(each.words) for each in self.classes]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the photo."""
        return self.picture.shape[0], self.picture.shape[1]

    @property
    def labels(self) -> np.ndarray:
        """int64 (H, W): index of a class, -1 = none of these."""
        return self.labels_at(self.size)

    @cached_property
    def scores(self) -> np.ndarray:
        """float32 (C, H, W) in 0..1. Large photos and many classes need much memory; `scores_at` returns smaller maps."""
        return self.scores_at(self.size)

    def labels_at(self, size: tuple[int, int]) -> np.ndarray:
        """Label map (height, width) at another size of the same photo."""
        best, scores = self.best_at(size)
        if self.background is None:
            return best
        thresholds = np.array([self.threshold_of(name) for name in self.names], dtype=np.float32)
        return np.where(scores < (thresholds[best] if self.thresholds else self.background), -1, best)

    def threshold_of(self, name: str) -> float | None:
        """Threshold of a class; None if every pixel gets a class."""
        return None if self.background is None else self.thresholds.get(name, self.background)

    def best_at(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The best class of each pixel without the threshold, int64 (height, width), and its score, float32."""
        best = self._best_at(size)
        return best.labels.numpy(), self._score(best.values, best).numpy()

    def scores_at(self, size: tuple[int, int], index: int | None = None) -> np.ndarray:
        """Score maps (C, height, width) at another size of the same photo, or the one (height, width) of class `index`.

        If two classes have the same score after rounding to float32, the class with the lower logit gets the next smaller
        number, so that the argmax of the scores is the label.
        """
        best = self._best_at(size)
        score = self._score(best.values, best)
        below = torch.nextafter(score, torch.zeros(()))
        chosen = range(len(self.classes)) if index is None else [index]
        maps = torch.empty(len(chosen), *size)
        for place, values in self._maps(size, chosen):
            part = maps[place : place + len(values)]
            part.copy_(self._score(values, best))
            wins = best.labels == torch.tensor(chosen[place : place + len(values)])[:, None, None]
            torch.where(wins, score, torch.minimum(part, below), out=part)
        return maps.numpy() if index is None else maps[0].numpy()

    def area_shares(self, labels: np.ndarray) -> list[float]:
        """Share of the photo that each class covers in a label map; the rest is none of these."""
        counts = np.bincount(labels.ravel() + 1, minlength=len(self.classes) + 1)[1:]
        return (counts / max(labels.size, 1)).tolist()

    def patch_scores(self, y: int, x: int) -> np.ndarray:
        """Scores (C,) in 0..1 of the patch in row `y`, column `x` of `grid`."""
        values = self._patch_values(y, x)
        if not self._is_softmax:
            return self._score(values).numpy()
        stuff = self._stitch(self._stuff, self.grid, grid=True)[0, y, x]
        return self._score(values, Best(*values.max(dim=0), self.calibration.total(values, stuff), stuff)).numpy()

    def patch_label(self, y: int, x: int) -> int:
        """Index of the best class of the patch in row `y`, column `x` of `grid`, without the threshold."""
        return int(self._patch_values(y, x).argmax())

    @property
    def attention_shape(self) -> tuple[int, int]:
        """(layers, heads) of `cross_attention`; (0, 0) if this result has no attention."""
        layers = self.outputs[0].attention_scores
        return len(layers), len(layers[0]) if layers else 0

    def cross_attention(self, layer: int = -1, head: int | None = None) -> np.ndarray:
        """Attention of each patch to each class: the softmax of the cross-attention scores s over all words.

            last layer        A_c = exp(z_c) / (exp(z_none) + sum_k exp(z_k)),  z = scale * s + bias,  z_none = logit(threshold)
            earlier layers    A_c = exp(s_c) / sum_k exp(s_k), as the layer computes it

        The scores of the last layer are the mask logits. So its attention uses the same calibration as the scores of the
        masks, and "none of these" takes part in the softmax as it does in the labels. The paper leaves this open. The shares of
        synonyms are added. With `company`, the softmax also runs over its words.

        Args:
            layer: index of a layer of the decoder.
            head: index of a head; None = softmax of the mean score of all heads.

        Returns:
            float32 (C, h, w); together with `company_attention` and `none_attention` it sums to 1.

        Raises:
            LdvcError: this result has no attention (plain similarity, or `attention=False`).
        """
        return self._attention(layer, head)[:-2].numpy()

    def company_attention(self, layer: int = -1, head: int | None = None) -> np.ndarray:
        """Attention (h, w) to all words of `company` together; arguments as for `cross_attention`."""
        return self._attention(layer, head)[-2].numpy()

    def none_attention(self, layer: int = -1, head: int | None = None) -> np.ndarray:
        """Attention (h, w) to "none of these", 0 in layers before the last; arguments as for `cross_attention`."""
        return self._attention(layer, head)[-1].numpy()

    def _attention(self, layer: int, head: int | None) -> Tensor:
        """(C + 2, h, w): classes, company, none of these."""
        layers = self.attention_shape[0]
        if not layers:
            raise LdvcError(f"This result holds no attention: segment with attention=True and {A_DECODER}.")
        classes = len(self.classes)
        owner = torch.tensor(self.embedding_classes + [classes] * len(self.company) + [classes + 1])
        maps = []
        for output in self.outputs:
            scores = output.attention_scores[layer]  # (heads, E, h, w)
            scores = scores.mean(dim=0) if head is None else scores[head]
            none = scores.new_full((1, *scores.shape[1:]), -torch.inf)
            if layer in (-1, layers - 1):
                scores = self.calibration(scores)
                none.fill_(self.calibration.none_logit)
            weights = torch.cat([scores, none]).softmax(dim=0)
            maps.append(weights.new_zeros(classes + 2, *weights.shape[1:]).index_add_(0, owner, weights))
        return maps[0] if len(maps) == 1 else self._stitch(maps, self.grid, grid=True)

    @property
    def has_routing(self) -> bool:
        """Whether the decoder has LCSA and its routing was kept."""
        return bool(self.outputs[0].routing)

    def routing(self, y: int, x: int, layer: int = -1) -> PatchRouting:
        """Regions to which LCSA routed the patch in row `y`, column `x` of `grid` (see `patch_at` for a pixel of the photo).

        Raises LdvcError if this decoder has no LCSA, or the result was made with attention=False.
        """
        if not self.has_routing:
            raise LdvcError("This result holds no routing: segment with attention=True and the decoder 'ldvc'.")
        return patch_routing(self.outputs, y, x, layer=layer, patch=self.patch)

    def patch_attention(self, y: int, x: int) -> np.ndarray:
        """Attention (h, w) of the patch in row `y`, column `x` of `grid` to all patches, in the last block of the image tower.

        It is the mean over heads and windows, see `attention_of_patch`. Raises LdvcError for other decoders than plain CLIP.
        """
        if self.outputs[0].patch_attention is None:
            raise LdvcError("This result holds no attention of patches: segment with attention=True and the decoder 'clip'.")
        return attention_of_patch(self.outputs, y, x, input_size=self.input_size, patch=self.patch).numpy()

    def patch_similarity(self, y: int, x: int, *, after: bool) -> np.ndarray:
        """Cosine similarity (h, w), float32 in -1..1, of the patch in row `y`, column `x` of `grid` and all patches.

        The features are inputs of the decoder or, with `after`, of its last cross-attention. With plain CLIP, which has no
        decoder, both are the same. Where windows overlap, unit vectors are averaged. Raises LdvcError without features.
        """
        maps = [output.unit_patches(after=after) for output in self.outputs]
        patches = maps[0]  # (d, h, w)
        if len(maps) > 1:
            patches = torch.nn.functional.normalize(self._stitch(maps, self.grid, grid=True), dim=0)
        return torch.einsum("dhw,d->hw", patches, patches[:, y, x]).clamp(-1, 1).numpy()

    @property
    def features(self) -> list[DecoderFeatures]:
        """Patch features and class embeddings before and after the decoder, by window; raises LdvcError without them."""
        if self.outputs[0].features is None:
            raise LdvcError(f"This result holds no features: segment with features=True and {A_DECODER}.")
        return [output.features for output in self.outputs]

    @property
    def embedding_classes(self) -> list[int]:
        """For each class embedding of `features`, the index of its class: all words, class by class."""
        return [index for index, each in enumerate(self.classes) for _ in each.words]

    @property
    def patch_labels(self) -> list[np.ndarray]:
        """The best class of each patch, window by window: (N,) indices, without the threshold."""
        return [each.argmax(dim=0).flatten().numpy() for each in self._calibrated]

    def patch_at(self, y: float, x: float) -> tuple[int, int]:
        """(row, column) of the patch that holds the photo's pixel (y, x)."""
        height, width = self.size
        row = int(y * self.input_size[0] / height // self.patch)
        column = int(x * self.input_size[1] / width // self.patch)
        return min(max(row, 0), self.grid[0] - 1), min(max(column, 0), self.grid[1] - 1)

    def attention_at(self, attention: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Upsample maps (..., h, w) on `grid` to a size of the photo, without the padding."""
        maps = torch.from_numpy(np.ascontiguousarray(attention, dtype=np.float32))
        input_window = Window(0, 0, *self.input_size)
        rows, columns = axes(size, input_window, self.grid, input_size=self.input_size, patch=self.patch)
        return upsample(maps.reshape(-1, *self.grid), rows, columns).reshape(*maps.shape[:-2], *size).numpy()

    # ---- from patches to pixels -----------------------------------------------------------------------------------

    @property
    def _is_softmax(self) -> bool:
        return isinstance(self.calibration, SoftmaxCalibration)

    @property
    def _averages_scores(self) -> bool:
        """Whether several windows are averaged after the sigmoid, as in the evaluation protocol. (A softmax follows later.)"""
        return len(self.outputs) > 1 and not self._is_softmax

    @cached_property
    def _calibrated(self) -> list[Tensor]:
        return [self.calibration(output.logits) for output in self.outputs]

    @cached_property
    def _stuff(self) -> list[Tensor]:
        """(1, h, w) of each window, calibrated; very low where there are no stuff words."""
        maps = [torch.full_like(each.logits[0], -1e4) if each.stuff is None else each.stuff for each in self.outputs]
        return [self.calibration(each)[None] for each in maps]

    def _score(self, values: Tensor, best: Best | None = None) -> Tensor:
        """float32 scores of values of `_maps`, above 0, so that a lower number exists; a softmax also needs `best`."""
        if self._is_softmax:
            scores = self.calibration.scores(values, best.total, best.stuff)
        else:
            scores = values.float() if self._averages_scores else torch.sigmoid(values)
        return scores.clamp_(min=torch.finfo(torch.float32).tiny)

    def _patch_values(self, y: int, x: int) -> Tensor:
        """(C,) values of `_maps` for one patch."""
        after = torch.sigmoid if self._averages_scores else None
        return self._stitch(self._calibrated, self.grid, after=after, grid=True)[:, y, x]

    def _best_at(self, size: tuple[int, int]) -> Best:
        """The best class of each pixel, cached for a few sizes, because each score map needs it."""
        best = self._best.get(tuple(size)) or self._compute_best(size)
        self._best[tuple(size)] = best
        for oldest in list(self._best)[:-SIZES_KEPT]:
            self._best.pop(oldest, None)
        return best

    def _compute_best(self, size: tuple[int, int]) -> Best:
        if len(self.outputs) == 1 and not self._is_softmax:
            options = {"input_size": self.input_size, "window": self.outputs[0].window, "patch": self.patch}
            return Best(*upsampled_argmax(self._calibrated[0], size, **options))
        stuff = total = self._stitch(self._stuff, size)[0] if self._is_softmax else None
        best = torch.full(size, -torch.inf, dtype=torch.float32 if self._is_softmax else torch.float64)
        labels = torch.zeros(size, dtype=torch.int64)
        for start, values in self._maps(size, range(len(self.classes))):
            top, index = values.max(dim=0)
            labels = torch.where(top > best, index + start, labels)
            best = torch.maximum(best, top)
            if total is not None:
                total = self.calibration.total(values, total)
        return Best(best, labels, total, stuff)

    def _maps(self, size: tuple[int, int], indices: range | list[int]) -> Iterator[tuple[int, Tensor]]:
        """Upsampled maps, a few classes at a time.

        Yields the position of the first class in `indices`, and (n, height, width) calibrated logits, float32. With several
        windows, they are averaged scores in float64, which distinguishes logits up to 36.
        """
        step = max(1, CHUNK // max(size[0] * size[1], 1))
        after = torch.sigmoid if self._averages_scores else None
        for start in range(0, len(indices), step):
            chosen = slice(indices[start], indices[min(start + step, len(indices)) - 1] + 1)
            yield start, self._stitch([each[chosen] for each in self._calibrated], size, after=after)

    def _stitch(self, maps: list[Tensor], size: tuple[int, int], **options) -> Tensor:
        """`ldvc.inference.stitch` with the windows of this photo."""
        windows = [output.window for output in self.outputs]
        return stitch(maps, windows, size, input_size=self.input_size, patch=self.patch, **options)
