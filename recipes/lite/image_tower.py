"""Step 4 of lite: the image tower learns which concepts each patch shows, without any mask.

    python -m recipes.lite.image_tower --work runs/lite_recipe --minutes 90

The student is an open_clip ViT on the cached features of step 1. The text side is the text tower of step 3 and a linear map
into the joint space, which learns, too. Three binary cross-entropies on logits `scale * cos(patch, name) + bias`:
- patches: the class evidence of a patch, summed over the ImageNet classes of each of 256 sampled concepts;
- CLS token: the same for the whole view;
- labels: a photo's label, or the nouns that at least two of its captions share, are positive for its CLS token and for the 8 %
  of its patches with the highest logits (multiple-instance learning); labels of other photos are weak negatives.
Writes `image.pt` every 100 steps and resumes from it.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from recipes.lite.stem_cache import GRID
from recipes.lite.steps import Training, options_of
from recipes.lite.text_tower import ARCHITECTURE, TARGET_WIDTH, TextStudent
from recipes.lite.wordnet import PERSON_LEXNAME, VISIBLE_LEXNAMES, WordNet

BATCH = 32
LEARNING_RATE = 1e-3
CONCEPTS = 256
EVERYDAY = 64  # of the concepts are everyday words
PATCHES = 200  # of 400 enter a step, which halves its time (as in FLIP, Li et al. 2023) ...
WHOLE_SHARE = 0.25  # ... except in the last quarter of the training


class ImageStudent(nn.Module):
    """open_clip's image tower on cached features, and the linear map of text embeddings into the joint space."""

    def __init__(self, stem_channels: int) -> None:
        super().__init__()
        clip = open_clip.CLIP(**json.loads(ARCHITECTURE.read_text())["architecture"])
        self.visual, self.logit_scale, self.logit_bias = clip.visual, clip.logit_scale, clip.logit_bias
        width, joint = self.visual.proj.shape
        # as the last layers of `ConvPatchEmbed`
        self.visual.conv1 = nn.Sequential(
            nn.BatchNorm2d(stem_channels, affine=False, momentum=0.01), nn.Conv2d(stem_channels, width, 1, bias=False)
        )
        self.text_map = nn.Linear(TARGET_WIDTH, joint, bias=False)

    def embed_images(self, features: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised embeddings of the CLS token (B, d) and of the patches (B, P, d).

        Args:
            features: (B, 400, 472).
            keep: (P,) indices of the patches that enter the ViT; None = all 400.
        """
        visual = self.visual
        tokens = visual.conv1(features.transpose(1, 2).unflatten(-1, (GRID, GRID))).flatten(2).transpose(1, 2)
        tokens = tokens + visual.positional_embedding[1:]
        if keep is not None:
            tokens = tokens[:, keep]
        cls = (visual.class_embedding + visual.positional_embedding[0]).expand(len(tokens), 1, -1)
        tokens = visual.transformer(visual.ln_pre(torch.cat([cls, tokens], dim=1)))  # (B, 1 + P, width)
        embeddings = F.normalize((visual.ln_post(tokens) @ visual.proj).float(), dim=-1)
        return embeddings[:, 0], embeddings[:, 1:]

    def embed_names(self, targets: Tensor) -> Tensor:
        """(C, 384) -> normalised (C, d)."""
        return F.normalize(self.text_map(targets.float()).float(), dim=-1)

    def logits(self, embeddings: Tensor, names: Tensor) -> Tensor:
        return self.logit_scale.exp() * embeddings @ names.T + self.logit_bias


class PhotoLabels:
    """The nouns that are true of each photo, from labels and captions.

    Attributes:
        names: L nouns that at least three photos have.
        labelled: (photos,) bool; has one of `names`.
        positive: (photos, L) bool; true, hypernyms included.
        uncertain: (photos, L) bool; a hyponym of a true noun: a dog may or may not be a chow.
    """

    def __init__(self, photos: list[dict[str, str]], row: dict[str, int], wordnet: WordNet) -> None:
        singular = {wordnet.plural(n): n for n in wordnet.common_nouns if len(n) > 2}
        of_photo = [self._names_of(photo, row, wordnet, singular) for photo in photos]
        counts = Counter(name for names in of_photo for name in names)
        self.names = sorted(name for name, n in counts.items() if n >= 3)
        index = {name: i for i, name in enumerate(self.names)}
        above = [wordnet.ancestors(sense.offset) if (sense := wordnet.visible_sense(n)) else set() for n in self.names]
        offsets = [sense.offset if (sense := wordnet.visible_sense(n)) else "" for n in self.names]
        L = len(self.names)
        is_a = torch.tensor([[offsets[j] in above[i] for j in range(L)] for i in range(L)])  # name j is a hypernym of name i
        self.labelled = torch.tensor([bool(names & index.keys()) for names in of_photo])
        own = torch.zeros(len(photos), L, dtype=torch.bool)
        for i, names in enumerate(of_photo):
            own[i, [index[n] for n in names if n in index]] = True
        self.positive = (own.float() @ is_a.float() > 0) | own
        self.uncertain = (own.float() @ is_a.T.float() > 0) & ~self.positive

    @staticmethod
    def _names_of(photo: dict[str, str], row: dict[str, int], wordnet: WordNet, singular: dict[str, str]) -> set[str]:
        names = set()
        label = re.sub(r" (easy|side)$", "", photo["label"].lower().replace("_", " "))
        label = label if label in row else singular.get(label, label)
        if label in row:
            names.add(label)
        if photo["captions"]:
            counts: Counter[str] = Counter()
            for caption in photo["captions"].lower().split(" || "):
                words = re.findall(r"[a-z]+", caption)
                grams = {" ".join(pair) for pair in zip(words[:-1], words[1:], strict=True)} | set(words)
                counts.update({singular.get(g, g) for g in grams})
            for name, n in counts.items():
                sense = wordnet.visible_sense(name) if n >= 2 and name in row and len(name) > 2 else None
                if sense is not None and (sense.lexname in VISIBLE_LEXNAMES or sense.lexname == PERSON_LEXNAME):
                    names.add(name)
        if names & {"man", "woman", "boy", "girl", "child", "person", "people", "lady", "guy"}:
            names.add("person")
        return names


@torch.inference_mode()
def embed_by_student(names: list[str], work: Path) -> Tensor:
    """Embeddings of names by the text tower of step 3, (N, 384)."""
    student = TextStudent()
    student.load_state_dict(torch.load(work / "text.pt", weights_only=True)["student"])
    tokens = SimpleTokenizer(context_length=24)([f"a photo of a {name}." for name in names])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.cat([F.normalize(student(part, 5).float(), dim=-1) for part in tokens.split(512)])


def main() -> None:
    args = options_of(__doc__, minutes=90.0)
    row = {name: i for i, name in enumerate(json.loads((args.work / "names.json").read_text()))}
    concepts = json.loads((args.work / "concepts.json").read_text())
    leaves = torch.zeros(1000, len(concepts))
    for k, concept in enumerate(concepts):
        leaves[concept["leaves"], k] = 1
    everyday = torch.tensor([k for k, concept in enumerate(concepts) if concept["everyday"]])
    labels = PhotoLabels(json.loads((args.work / "photos.json").read_text()), row, WordNet())
    concept_embeddings = embed_by_student([c["name"] for c in concepts], args.work)  # (K, 384)
    label_embeddings = embed_by_student(labels.names, args.work)
    print(f"{len(concepts)} concepts, {len(labels.names)} label names on {int(labels.labelled.sum())} photos", flush=True)

    n_views = json.loads((args.work / "stem_cache.json").read_text())["done"]
    arrays = {k: np.load(args.work / f"{k}.npy", mmap_mode="r")
              for k in ("features", "top_classes", "top_probabilities", "image_probabilities", "photo")}  # fmt: skip
    torch.manual_seed(0)
    student = ImageStudent(arrays["features"].shape[-1])
    decay = [p for p in student.parameters() if p.ndim > 1]
    rest = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
    training = Training(args.work / "image.pt", student, groups, rate=LEARNING_RATE, minutes=args.minutes)
    for passed in training:
        rows = np.sort(np.random.default_rng((0, training.step)).choice(n_views, BATCH, replace=False))
        features = torch.from_numpy(arrays["features"][rows]).view(torch.bfloat16)
        photo = torch.from_numpy(arrays["photo"][rows]).long()
        image_probabilities = torch.from_numpy(arrays["image_probabilities"][rows]).float()  # (B, 4, 1000)
        whole = passed > 1 - WHOLE_SHARE
        pick = torch.randperm(GRID * GRID)[:PATCHES].sort().values  # patches in the loss
        evidence = torch.zeros(BATCH, PATCHES, 1000).scatter_(
            2,
            torch.from_numpy(arrays["top_classes"][rows].astype(np.int64))[:, pick],
            torch.from_numpy(arrays["top_probabilities"][rows]).float()[:, pick],
        )
        # half of the concepts are those with most evidence in this batch, a quarter everyday words, a quarter random
        shown = (image_probabilities.amax(dim=(0, 1)) @ leaves) / leaves.sum(0).sqrt()
        shown = shown * torch.rand_like(shown)
        anything = torch.randint(len(concepts), (CONCEPTS // 2 - EVERYDAY,))
        chosen = torch.cat(
            [shown.topk(CONCEPTS // 2).indices, everyday[torch.randint(len(everyday), (EVERYDAY,))], anything]
        ).unique()

        plain = (photo == photo[:, :1]).all(dim=1)  # no mosaic: the photo's labels hold for the whole view
        is_labelled = plain & labels.labelled[photo[:, 0]]
        positive, uncertain = labels.positive[photo[is_labelled, 0]], labels.uncertain[photo[is_labelled, 0]]  # (B', L)
        used = positive.any(dim=0).nonzero().squeeze(1)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            cls, patches = student.embed_images(features, None if whole else pick)
        text = torch.cat([concept_embeddings[chosen], label_embeddings[used]])
        noise = 0.25 * torch.randn_like(text) / text.shape[-1] ** 0.5  # for embeddings of names that the tower has not learned
        embedded = student.embed_names(F.normalize(text + noise, dim=-1))
        in_loss = patches[:, pick] if whole else patches
        concept_logits = student.logits(in_loss, embedded[: len(chosen)])  # (B, P, K)
        patch_loss = F.binary_cross_entropy_with_logits(concept_logits, (evidence @ leaves[:, chosen]).clamp(0, 1))
        view_target = 1 - (1 - (image_probabilities @ leaves[:, chosen]).clamp(0, 1)).prod(dim=1)
        view_target = torch.where(
            plain[:, None], (image_probabilities[:, 0] @ leaves[:, chosen]).clamp(0, 1), view_target
        )
        cls_loss = F.binary_cross_entropy_with_logits(student.logits(cls, embedded[: len(chosen)]), view_target)

        label_loss = torch.zeros(())
        if len(used) and is_labelled.any():
            embedded = embedded[len(chosen) :]
            patch_logits = student.logits(patches[is_labelled], embedded)  # (B', P, L')
            best = patch_logits.topk(patches.shape[1] * 8 // 100, dim=1).values.mean(dim=1)  # (B', L')
            true = positive[:, used].float()
            weight = torch.where(true > 0, 1.0, 0.1) * (~uncertain[:, used]).float()
            both = torch.stack([best, student.logits(cls[is_labelled], embedded)])
            losses = F.binary_cross_entropy_with_logits(both, true.expand_as(both), reduction="none")
            label_loss = (losses * weight).sum() / (2 * weight.sum())
        loss = patch_loss + 0.5 * cls_loss + 0.05 * label_loss
        training.learn(loss)
        if training.step % 20 == 0:
            print(f"step {training.step}, patches {patch_loss.item():.4f}, CLS {cls_loss.item():.4f}, "
                  f"labels {label_loss.item():.3f}, {training.progress()}", flush=True)  # fmt: skip
        if training.step % 100 == 0:
            training.save()


if __name__ == "__main__":
    main()
