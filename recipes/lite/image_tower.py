"""Step 4 of lite: the image tower learns which concepts each patch shows, without masks.

    python -m recipes.lite.image_tower --work runs/lite_recipe --minutes 90

An open_clip ViT on the features of step 1, and a linear map of the text tower of step 3 into the joint space, learn
with three binary cross-entropies on logits `scale * cos(patch, name) + bias`:
- patches: the class evidence of a patch, summed over the ImageNet classes of each of 256 sampled concepts;
- CLS token: the same for the whole view;
- labels: a photo's label, or the nouns that at least two of its captions share, are positive for its CLS token and for the 8 %
  of its patches with the highest logits (multiple-instance learning); labels of other photos are weak negatives.
Writes `image.pt` every 200 steps and resumes from it.
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

from ldvc.modeling.conv_patch_embed import ConvPatchEmbed
from recipes.lite.stem_cache import GRID
from recipes.lite.steps import Training, options_of
from recipes.lite.text_tower import ARCHITECTURE, TARGET_WIDTH, TextStudent
from recipes.lite.wordnet import PERSON_LEXNAME, VISIBLE_LEXNAMES, WordNet

BATCH = 32
LEARNING_RATE = 1e-3
CONCEPTS = 256
EVERYDAY = 64  # number of the concepts that are everyday words
PATCHES = 200  # number of the 400 patches in a step, which halves its time (as in FLIP, Li et al. 2023)
WHOLE_SHARE = 0.25  # share of the training, at its end, whose steps use all patches
PEOPLE = {"man", "woman", "boy", "girl", "child", "person", "people", "lady", "guy"}


class ImageStudent(nn.Module):
    """open_clip's image tower on cached features, and the linear map of text embeddings into the joint space."""

    def __init__(self) -> None:
        super().__init__()
        clip = open_clip.CLIP(**ARCHITECTURE["architecture"])
        self.visual, self.logit_scale, self.logit_bias = clip.visual, clip.logit_scale, clip.logit_bias
        width, joint = self.visual.proj.shape
        patch_size = ARCHITECTURE["architecture"]["vision_cfg"]["patch_size"]
        self.visual.conv1 = ConvPatchEmbed(width, patch_size=patch_size, **ARCHITECTURE["patch_embed"])
        self.visual.conv1.backbone.requires_grad_(False)
        self.visual.conv1.scale.momentum = 0.01
        self.text_map = nn.Linear(TARGET_WIDTH, joint, bias=False)

    def embed_images(self, features: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised embeddings of the CLS token (B, d) and of the patches (B, P, d).

        `features`: (B, 400, 472). `keep`: (P,) indices of the patches that enter the ViT; None = all 400.
        """
        visual, conv = self.visual, self.visual.conv1
        features = features.transpose(1, 2).unflatten(-1, (GRID, GRID))
        tokens = conv.project(conv.scale(features)).flatten(2).transpose(1, 2) + visual.positional_embedding[1:]
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


def label_nouns(photos: list[dict[str, str]], known: set[str], wordnet: WordNet) -> tuple[list[str], Tensor, Tensor]:
    """The nouns that apply to each photo, from its `label` and `captions`, among the `known` names of the text tower.

    Returns:
        The L nouns that at least three photos have; (photos, L) bool, the true nouns, hypernyms included; (photos, L) bool,
        the uncertain nouns, hyponyms of a true noun: a dog may or may not be a chow.
    """
    singular = {wordnet.plural(n): n for n in wordnet.common_nouns if len(n) > 2}
    photo_nouns = [_nouns_of(photo, known, wordnet, singular) for photo in photos]
    counts = Counter(name for names in photo_nouns for name in names)
    nouns = sorted(name for name, count in counts.items() if count >= 3)
    mentioned = torch.tensor([[noun in names for noun in nouns] for names in photo_nouns])
    senses = [wordnet.visible_sense(noun) for noun in nouns]
    ancestors = [wordnet.ancestors(sense.offset) if sense else set() for sense in senses]
    # (L, L): the second noun is a hypernym of the first
    is_a = torch.tensor([[sense is not None and sense.offset in offsets for sense in senses] for offsets in ancestors])
    positive = (mentioned.float() @ is_a.float() > 0) | mentioned
    return nouns, positive, (mentioned.float() @ is_a.T.float() > 0) & ~positive


def _nouns_of(photo: dict[str, str], known: set[str], wordnet: WordNet, singular: dict[str, str]) -> set[str]:
    label = re.sub(r" (easy|side)$", "", photo["label"].lower().replace("_", " "))
    nouns = {label if label in known else singular.get(label, label)} & known
    counts: Counter[str] = Counter()
    for caption in filter(None, photo["captions"].lower().split(" || ")):
        words = re.findall(r"[a-z]+", caption)
        grams = {" ".join(pair) for pair in zip(words[:-1], words[1:], strict=True)} | set(words)
        counts.update({singular.get(gram, gram) for gram in grams})
    for name, count in counts.items():
        sense = wordnet.visible_sense(name) if count >= 2 and name in known and len(name) > 2 else None
        if sense is not None and sense.lexname in VISIBLE_LEXNAMES | {PERSON_LEXNAME}:
            nouns.add(name)
    return nouns | {"person"} if nouns & PEOPLE else nouns


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
    known = set(json.loads((args.work / "names.json").read_text()))
    concepts = json.loads((args.work / "concepts.json").read_text())
    leaves = torch.zeros(1000, len(concepts))
    for k, concept in enumerate(concepts):
        leaves[concept["leaves"], k] = 1
    everyday = torch.tensor([k for k, concept in enumerate(concepts) if concept["everyday"]])
    photos = json.loads((args.work / "photos.json").read_text())
    nouns, all_positive, all_uncertain = label_nouns(photos, known, WordNet())
    labelled = all_positive.any(dim=1)
    concept_embeddings = embed_by_student([c["name"] for c in concepts], args.work)  # (K, 384)
    noun_embeddings = embed_by_student(nouns, args.work)
    print(f"{len(concepts)} concepts, {len(nouns)} nouns on {int(labelled.sum())} photos", flush=True)

    n_views = json.loads((args.work / "stem_cache.json").read_text())["done"]
    array_names = ("features", "top_classes", "top_probabilities", "image_probabilities", "photo")
    arrays = [np.load(args.work / f"{array_name}.npy", mmap_mode="r") for array_name in array_names]
    torch.manual_seed(0)
    student = ImageStudent()
    learned = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    training = Training(args.work / "image.pt", student, groups, rate=LEARNING_RATE, minutes=args.minutes)
    for passed in training:
        rows = np.sort(np.random.default_rng((0, training.step)).choice(n_views, BATCH, replace=False))
        views = [torch.from_numpy(array[rows]) for array in arrays]
        features, top_classes, top_probabilities, image_probabilities, photo = views
        image_probabilities, photo = image_probabilities.float(), photo.long()  # (B, 4, 1000), (B, 4)
        whole = passed > 1 - WHOLE_SHARE
        pick = torch.randperm(GRID * GRID)[:PATCHES].sort().values  # patches in the loss
        evidence = torch.zeros(BATCH, PATCHES, 1000)
        evidence.scatter_(2, top_classes.long()[:, pick], top_probabilities.float()[:, pick])
        # half of the concepts have the most evidence in this batch, a quarter are everyday words, a quarter are random
        likely = (image_probabilities.amax(dim=(0, 1)) @ leaves) / leaves.sum(0).sqrt()
        likely = (likely * torch.rand_like(likely)).topk(CONCEPTS // 2).indices
        random_concepts = torch.randint(len(concepts), (CONCEPTS // 2 - EVERYDAY,))
        chosen = torch.cat([likely, everyday[torch.randint(len(everyday), (EVERYDAY,))], random_concepts]).unique()

        is_plain = (photo == photo[:, :1]).all(dim=1)  # no mosaic: the photo's labels hold for the whole view
        is_labelled = is_plain & labelled[photo[:, 0]]
        positive, uncertain = all_positive[photo[is_labelled, 0]], all_uncertain[photo[is_labelled, 0]]  # (B', L)
        used_nouns = positive.any(dim=0).nonzero().squeeze(1)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            cls, patches = student.embed_images(features.view(torch.bfloat16), None if whole else pick)
        text = torch.cat([concept_embeddings[chosen], noun_embeddings[used_nouns]])
        noise = 0.25 * torch.randn_like(text) / text.shape[-1] ** 0.5  # so that embeddings of unknown names work, too
        names, label_names = student.embed_names(F.normalize(text + noise, dim=-1)).split([len(chosen), len(used_nouns)])
        concept_logits = student.logits(patches[:, pick] if whole else patches, names)  # (B, P, K)
        patch_loss = F.binary_cross_entropy_with_logits(concept_logits, (evidence @ leaves[:, chosen]).clamp(0, 1))
        quadrants = (image_probabilities @ leaves[:, chosen]).clamp(0, 1)  # (B, 4, K)
        view_target = torch.where(is_plain[:, None], quadrants[:, 0], 1 - (1 - quadrants).prod(dim=1))
        cls_loss = F.binary_cross_entropy_with_logits(student.logits(cls, names), view_target)

        label_loss = torch.zeros(())
        if len(used_nouns):
            patch_logits = student.logits(patches[is_labelled], label_names)  # (B', P, L')
            best = patch_logits.topk(patches.shape[1] * 8 // 100, dim=1).values.mean(dim=1)  # (B', L')
            true = positive[:, used_nouns].float()
            weight = torch.where(true > 0, 1.0, 0.1) * (~uncertain[:, used_nouns]).float()
            both = torch.stack([best, student.logits(cls[is_labelled], label_names)])
            losses = F.binary_cross_entropy_with_logits(both, true.expand_as(both), reduction="none")
            label_loss = (losses * weight).sum() / (2 * weight.sum())
        loss = patch_loss + 0.5 * cls_loss + 0.05 * label_loss
        training.learn(loss, patches=patch_loss, CLS=cls_loss, labels=label_loss)


if __name__ == "__main__":
    main()
