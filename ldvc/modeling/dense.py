"""Dense features of a frozen CLIP without training: other ways to compute the last block of its image tower.

CLIP's last block mixes the whole picture into each token, which blurs the patches. Two published methods keep positions apart.
They do not change the blocks before. With z = LN1(x), they keep only the attention of the last block, without the residual
connection and the MLP: o = W_o (A v). Then follow ln_post and the projection.

plain    the block as it is.
naclip   NACLIP (Hajimiri et al., "Pay Attention to Your Neighbours", arXiv 2404.08181): each token attends to tokens with
         similar keys and, by a Gaussian window with a deviation of 5 patches, to its neighbours.
sc_clip  SC-CLIP (Bai et al., "Self-Calibrated CLIP for Training-Free Open-Vocabulary Segmentation", arXiv 2411.15869):
         outlier patches are replaced, and patches are averaged with those that are similar in earlier blocks (see `_sc_clip`).

Both follow the computation of the authors' code where a paper leaves a detail open. The block numbers are those of a tower of
12 blocks; in other towers they are scaled.
"""

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.nn import functional as F

from ldvc.modeling.towers import ImageFeatures, ImageTower, run_block

GAUSSIAN_STD = 5.0  # patches, NACLIP
OUTLIER_NEIGHBOURS, OUTLIER_SHARE = 30, 0.05  # SC-CLIP, as all numbers below
SIMILAR = 0.4  # lowest cosine of patches that are averaged
SHARPNESS = 3.0  # factor of the similarity before its softmax
CLASS_TOKEN_SHARE = 0.3
MIDDLE, EARLY, LAST_ADDED = 9, 4, 10  # blocks of 12


def dense_features(
    tower: ImageTower, patch_tokens: Tensor, reading: str = "plain", *, attention: bool = False
) -> ImageFeatures:
    """Features of pictures in the joint space, without prompts, not normalised.

    Args:
        tower: image tower of the frozen CLIP.
        patch_tokens: (B, width, h, w), from `tower.embed_patches`.
        reading: "plain", "naclip" or "sc_clip".
        attention: also return the attention (B, N, N) of patches to patches in the last block, the mean over heads.
    """
    visual = tower.clip.visual
    grid = tuple(patch_tokens.shape[-2:])
    *blocks, last = visual.transformer.resblocks
    outputs = [tower.first_tokens(patch_tokens, antialias=reading == "plain")]  # x_0, x_1, ..., each (B, 1 + N, width)
    for block in blocks:
        outputs.append(run_block(block, outputs[-1]))
    if reading == "plain":
        tokens, weights = run_block(last, outputs[-1]), None
        if attention:
            query, key = _split(last, outputs[-1], slice(0, 2))
            weights = ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(dim=-1)
    elif reading == "naclip":
        tokens, weights = _naclip(last, outputs[-1], grid)
    else:
        assert reading == "sc_clip", f"there is no reading {reading!r}"
        tokens, weights = _sc_clip(last, outputs, grid)
    with torch.autocast(tokens.device.type, enabled=False):
        embeddings = visual.ln_post(tokens) @ visual.proj  # (B, 1 + N, d)
    if attention and reading != "sc_clip":
        weights = weights[:, :, 1:, 1:]
    return ImageFeatures(embeddings[:, 0], embeddings[:, 1:], grid, weights.mean(dim=1) if attention else None)


def _split(block: ResidualAttentionBlock, tokens: Tensor, part: slice) -> list[Tensor]:
    """Queries, keys and values (part 0, 1, 2) of tokens: each (B, heads, N, d_head)."""
    attention, width = block.attn, tokens.shape[-1]
    rows = slice(part.start * width, part.stop * width)
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
    projected = F.linear(block.ln_1(tokens), attention.in_proj_weight[rows], bias)
    return [x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in projected.chunk(part.stop - part.start, dim=-1)]


def _attend(block: ResidualAttentionBlock, weights: Tensor, values: Tensor) -> Tensor:
    """W_o (A v) for weights A and values v, (B, N, width)."""
    return block.ls_1(block.attn.out_proj((weights @ values).transpose(1, 2).flatten(2)))


def _key_scores(key: Tensor) -> Tensor:
    """(B, heads, N, N): k k^T / sqrt(d_head)."""
    return (key @ key.mT) * key.shape[-1] ** -0.5


def _naclip(block: ResidualAttentionBlock, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A = softmax(k k^T / sqrt(d_head) + w), w_ij = exp(-|p_i - p_j|^2 / (2 s^2)) between patches, 0 for the class token."""
    key, value = _split(block, tokens, slice(1, 3))
    positions = (torch.arange(side, device=tokens.device, dtype=tokens.dtype) for side in grid)
    rows, columns = (torch.exp(-((position[:, None] - position) ** 2) / (2 * GAUSSIAN_STD**2)) for position in positions)
    window = torch.einsum("ij,kl->ikjl", rows, columns).reshape(len(rows) * len(columns), -1)  # (N, N)
    weights = (_key_scores(key) + F.pad(window, (1, 0, 1, 0))).softmax(dim=-1)
    return _attend(block, weights, value), weights


def _sc_clip(block: ResidualAttentionBlock, outputs: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """SC-CLIP's form of the last block. x_l are the tokens after block l of 12.

    1. Outliers among the patches of x_11 become the mean of their neighbours, and so do the same places in x_9.
    2. S0 = cosines of x_9; x_11 is averaged with S0 (see `_average_similar`).
    3. A = (softmax(3 (S0 - mean S0), negative entries left out) + softmax(k k^T / sqrt(d_head))) / 2, patches only;
       o = W_o (A v) + 0.3 * class token of x_11.
    4. o is averaged with the cosines of x_4.
    5. Steps 3 and 4 are applied to r = x_4 + ... + x_10, with its own class token.
    6. The patches of the result are o + r. Its class token comes from the complete block.

    `outputs` are x_0 to x_11, (B, 1 + N, width). Returns (B, 1 + N, width) and the attention (B, heads, N, N) of step 3.
    """
    blocks = len(outputs)
    middle, early, last_added = (min(blocks - 1, round(number * blocks / 12)) for number in (MIDDLE, EARLY, LAST_ADDED))
    class_token, patches = outputs[-1].split([1, outputs[-1].shape[1] - 1], dim=1)
    outlier = outliers(patches)
    similarity = _cosines(_replace_outliers(outputs[middle][:, 1:], outlier, grid))
    shifted = SHARPNESS * (similarity - similarity.mean(dim=(1, 2), keepdim=True))
    left_out = (shifted < 0).logical_and_(~torch.eye(len(shifted[0]), dtype=torch.bool, device=shifted.device))
    similar = shifted.masked_fill(left_out, -torch.inf).softmax(dim=-1)[:, None]
    early_similarity = _cosines(outputs[early][:, 1:])

    def read(tokens: Tensor, of_class: Tensor) -> tuple[Tensor, Tensor]:
        key, value = _split(block, tokens, slice(1, 3))
        weights = (similar + _key_scores(key).softmax(dim=-1)) / 2
        return _average_similar(_attend(block, weights, value) + CLASS_TOKEN_SHARE * of_class, early_similarity), weights

    features, weights = read(_average_similar(_replace_outliers(patches, outlier, grid), similarity), class_token)
    added = torch.stack(outputs[early : last_added + 1]).sum(dim=0)
    features = features + read(added[:, 1:], added[:, :1])[0]
    return torch.cat([run_block(block, class_token, context=patches), features], dim=1), weights


def outliers(patches: Tensor) -> Tensor:
    """Patches (B, N, width) -> (B, N): whether the local outlier factor is among the highest 5 %, as in SC-CLIP's code.

    With D(i) the squared distance of patch i to its 30th neighbour, the factor is the mean of D(i) / D(j) over these
    neighbours j. (Breunig et al., "LOF", 2000, take plain distances, and means of the reachability distances instead of D.)
    """
    neighbours = min(OUTLIER_NEIGHBOURS, patches.shape[1] - 1)
    if not neighbours:
        return torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
    # differences, not products: a rounded product would change which patches are neighbours
    distances = torch.cdist(patches.float(), patches.float(), compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest, indices = distances.topk(neighbours + 1, largest=False)  # (B, N, 1 + neighbours), the patch itself first
    density = neighbours / nearest[..., -1]  # (B, N)
    around = density[:, None].expand_as(distances).gather(2, indices[..., 1:])
    factor = (around / density[..., None]).mean(dim=-1)
    return factor > factor.quantile(1 - OUTLIER_SHARE, dim=-1, keepdim=True)  # none where equal patches make it NaN


def _replace_outliers(patches: Tensor, outlier: Tensor, grid: tuple[int, int]) -> Tensor:
    """Replace outliers in patches (B, N, width) by the mean of their normal 3 x 3 neighbours, if there are any."""
    good = (~outlier).to(patches.dtype)[..., None]  # (B, N, 1)

    def sum_around(maps: Tensor) -> Tensor:
        maps = maps.mT.unflatten(2, grid)
        return F.avg_pool2d(maps, 3, stride=1, padding=1, divisor_override=1).flatten(2).mT

    count = sum_around(good)
    return torch.where(outlier[..., None] & (count > 0), sum_around(patches * good) / count.clamp(min=1), patches)


def _cosines(patches: Tensor) -> Tensor:
    """Cosine similarities of patches: (B, N, width) -> (B, N, N)."""
    unit = F.normalize(patches, dim=-1)
    return unit @ unit.mT


def _average_similar(tokens: Tensor, similarity: Tensor) -> Tensor:
    """Means of tokens (B, N, width), weighted with the cosines (B, N, N) that are 0.4 or more."""
    weights = similarity.masked_fill(similarity < SIMILAR, 0)
    return (weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)) @ tokens
