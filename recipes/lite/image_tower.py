"""Step 4 of lite: the image tower learns to say of every patch which concepts it shows.

    python -m recipes.lite.image_tower --data data --work runs/lite_recipe --minutes 40

The student is a plain open_clip ViT on the cached stem features of step 1. The text side is a linear map of what the text
tower of step 3 says of a name (or, as long as there is none, of the name's target of step 2) into the joint space. Three
binary cross-entropies on logits `scale * cos(patch, name) + bias`:
- patches: the teacher's class evidence of that patch, summed over the ImageNet classes below each of 256 sampled concepts,
- CLS: the same for the whole view,
- labels: a photo's own label or the nouns that at least two of its captions share are true of its CLS and of the 8 % of
  its patches that show them best (multiple-instance learning); labels of other photos are weakly false.
No mask is read, but for the log: argmax per patch on the validation photos of msrc and coco-mini.
Writes `image.pt` (resumable) every 100 steps.
"""

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor, nn

from recipes.lite.stem_cache import GRID, SIZE, load_teacher
from recipes.lite.text_tower import ARCHITECTURE, TARGET_WIDTH, TextStudent
from recipes.lite.wordnet import PERSON_LEXNAME, VISIBLE_LEXNAMES, WordNet

BATCH = 32
CONCEPTS = 256
EVERYDAY = 64  # of them are words from the list made by hand
PATCHES = 200  # of 400 enter a step, which halves its time (as FLIP does, Li et al. 2023) ...
WHOLE_SHARE = 0.25  # ... but for the last quarter of the training, so that the ViT ends on whole grids


class ImageStudent(nn.Module):
    """open_clip's image tower behind cached stem features, and the linear map of text targets into the joint space."""

    def __init__(self, stem_channels: int) -> None:
        super().__init__()
        clip = open_clip.CLIP(**json.loads(ARCHITECTURE.read_text())["architecture"])
        self.visual, self.logit_scale, self.logit_bias = clip.visual, clip.logit_scale, clip.logit_bias
        width, joint = self.visual.proj.shape
        # The head of `ConvPatchEmbed`, in front of which the features were cached.
        self.visual.conv1 = nn.Sequential(
            nn.BatchNorm2d(stem_channels, affine=False, momentum=0.01), nn.Conv2d(stem_channels, width, 1, bias=False)
        )
        self.text_map = nn.Linear(TARGET_WIDTH, joint, bias=False)

    def embed_images(self, features: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 400, 472) -> normalised CLS (B, d) and patches (B, P, d).

        Args:
            features: of the stem.
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
    """What is known of each photo besides its pixels: synsets that are true of it, from labels and captions."""

    def __init__(self, photos: list[dict[str, str]], row: dict[str, int], wordnet: WordNet) -> None:
        self.names: list[str] = []
        of_photo: list[set[str]] = []
        singular = {wordnet.plural(n): n for n in wordnet.common_nouns if len(n) > 2}
        for photo in photos:
            of_photo.append(self._names_of(photo, row, wordnet, singular))
        counts = Counter(name for names in of_photo for name in names)
        self.names = sorted(name for name, n in counts.items() if n >= 3)
        index = {name: i for i, name in enumerate(self.names)}
        above = [wordnet.ancestors(sense.offset) if (sense := wordnet.visible_sense(n)) else set() for n in self.names]
        offsets = [sense.offset if (sense := wordnet.visible_sense(n)) else "" for n in self.names]
        L = len(self.names)
        is_a = torch.tensor(
            [[offsets[j] in above[i] for j in range(L)] for i in range(L)]
        )  # name i is a kind of name j
        self.labelled = torch.tensor([bool(names & index.keys()) for names in of_photo])
        own = torch.zeros(len(photos), L, dtype=torch.bool)
        for i, names in enumerate(of_photo):
            own[i, [index[n] for n in names if n in index]] = True
        self.positive = (own.float() @ is_a.float() > 0) | own  # (photos, L): with everything that it is a kind of
        self.unknown = (own.float() @ is_a.T.float() > 0) & ~self.positive  # a dog may or may not be a chow

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
def replace_by_student(targets: Tensor, names: dict[int, str], work: Path) -> None:
    """Put what the finished text tower says in the place of the targets (N, 384) that it learned from, in some rows.

    The image tower then learns to meet the names where they really are.
    """
    student = TextStudent()
    student.load_state_dict(torch.load(work / "text.pt", weights_only=True)["student"])
    tokenizer = SimpleTokenizer(context_length=24)
    rows = list(names)
    tokens = tokenizer([f"a photo of a {name}." for name in names.values()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = torch.cat([F.normalize(student(part, 5).float(), dim=-1) for part in tokens.split(512)])
    print(
        f"text tower in the place of its targets: mean cosine {(said * targets[rows]).sum(-1).mean():.3f}", flush=True
    )
    targets[rows] = said


class Probe:
    """Per-patch argmax on validation photos, to watch the training; masks are used here and nowhere else in this step."""

    def __init__(self, data: Path, work: Path, row: dict[str, int]) -> None:
        self.sets, self.names = {}, []
        for name in ("msrc", "coco-mini"):
            info = json.loads((data / name / "dataset.json").read_text())
            ids = (data / name / "val.txt").read_text().split()
            cache = work / f"probe_{name}.pt"
            if not cache.exists():
                _, stem = load_teacher()
                features = []
                with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                    for i in ids:
                        photo = Image.open(data / name / "images" / f"{i}.jpg").convert("RGB").resize((SIZE, SIZE))
                        pixels = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None] / 127.5 - 1
                        features.append(stem.features(pixels).flatten(2).transpose(1, 2).bfloat16())
                torch.save(torch.cat(features), cache)
            masks = [
                Image.open(data / name / "masks" / f"{i}.png").resize((GRID, GRID), Image.Resampling.NEAREST)
                for i in ids
            ]
            truth = torch.from_numpy(np.stack([np.asarray(m) for m in masks])).long().flatten(1)
            background = info["background_index"]
            if background is not None:
                truth[truth == background] = 255
            self.names += info["classes"]
            self.sets[name] = (torch.load(cache), truth, [row[c] for c in info["classes"]], info["classes"])

    @torch.inference_mode()
    def __call__(self, student: ImageStudent, targets: Tensor) -> str:
        student.eval()
        said = []
        for name, (features, truth, rows, classes) in self.sets.items():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                patches = torch.cat([student.embed_images(chunk)[1] for chunk in features.split(32)])
                similarity = patches @ student.embed_names(targets[rows]).T  # (V, 400, C)
            present = torch.stack([torch.bincount(t[t != 255], minlength=len(classes)) > 0 for t in truth])  # (V, C)
            known = truth != 255
            if name == "coco-mini":
                similarity[..., 0] = -9  # background is no name here
            among_all = similarity.argmax(-1)
            among_present = similarity.masked_fill(~present[:, None], -9).argmax(-1)
            objects = [c for c in ("cow", "aeroplane", "cat", "boat", "chair", "sheep") if c in classes]
            ious = []
            for c in map(classes.index, objects):
                inter = ((among_all == c) & (truth == c)).sum()
                ious.append((inter / ((((among_all == c) & known) | (truth == c)).sum())).item())
            accuracy_all, accuracy_present = (
                (best == truth)[known].float().mean() for best in (among_all, among_present)
            )
            said.append(f"{name}: accuracy among all names {accuracy_all:.3f}, among present {accuracy_present:.3f}")
            if ious:
                said.append(f"mIoU of objects {np.mean(ious):.3f}")
        student.train()
        return "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, default=Path("runs/lite_recipe"))
    parser.add_argument(
        "--minutes", type=float, default=40, help="training time; the learning rate falls to zero by its end"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--fixed-stem",
        action="store_true",
        help="leave the map into the ViT as it is: views stored behind it stay valid",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    names: list[str] = json.loads((args.work / "names.json").read_text())
    row = {name: i for i, name in enumerate(names)}
    targets = torch.from_numpy(np.load(args.work / "targets.npy")).float()
    concepts = json.loads((args.work / "concepts.json").read_text())
    leaves = torch.zeros(1000, len(concepts))
    for k, concept in enumerate(concepts):
        leaves[concept["leaves"], k] = 1
    everyday = torch.tensor([k for k, concept in enumerate(concepts) if concept["everyday"]])
    labels = PhotoLabels(json.loads((args.work / "photos.json").read_text()), row, WordNet())
    probe = Probe(args.data, args.work, row)
    if (args.work / "text.pt").exists():
        needed = {*(c["name"] for c in concepts), *labels.names, *probe.names}
        replace_by_student(targets, {row[name]: name for name in needed}, args.work)
    concept_targets = targets[[row[c["name"]] for c in concepts]]  # (K, 384)
    label_targets = targets[[row[n] for n in labels.names]]
    print(
        f"{len(concepts)} concepts, {len(labels.names)} label names on {int(labels.labelled.sum())} photos", flush=True
    )

    n_views = json.loads((args.work / "stem_cache.json").read_text())["done"]
    arrays = {k: np.load(args.work / f"{k}.npy", mmap_mode="r")
              for k in ("features", "top_classes", "top_probabilities", "image_probabilities", "photo")}  # fmt: skip
    torch.manual_seed(args.seed)
    student = ImageStudent(arrays["features"].shape[-1])
    decay = [p for p in student.parameters() if p.ndim > 1]
    rest = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    checkpoint_file = args.work / "image.pt"
    elapsed, step = 0.0, 0
    if checkpoint_file.exists():
        saved = torch.load(checkpoint_file, weights_only=True)
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        elapsed, step = saved["elapsed"], saved["step"]

    if args.fixed_stem:
        student.visual.conv1.requires_grad_(False)
    budget, start = args.minutes * 60, time.time() - elapsed
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 100) * max(0.01, 1 - elapsed / budget)
        rows = np.sort(np.random.default_rng((args.seed, step)).choice(n_views, BATCH, replace=False))
        features = torch.from_numpy(arrays["features"][rows]).view(torch.bfloat16)
        photo = torch.from_numpy(arrays["photo"][rows]).long()
        image_probabilities = torch.from_numpy(arrays["image_probabilities"][rows]).float()  # (B, 4, 1000)
        whole = elapsed > (1 - WHOLE_SHARE) * budget
        pick = torch.randperm(GRID * GRID)[:PATCHES].sort().values  # patches in the loss
        evidence = torch.zeros(BATCH, PATCHES, 1000).scatter_(
            2,
            torch.from_numpy(arrays["top_classes"][rows].astype(np.int64))[:, pick],
            torch.from_numpy(arrays["top_probabilities"][rows]).float()[:, pick],
        )
        # Half of the concepts are those that this batch shows most, the other half are random, many of them everyday words.
        shown = (image_probabilities.amax(dim=(0, 1)) @ leaves) / leaves.sum(0).sqrt()
        shown = shown * torch.rand_like(shown)
        anything = torch.randint(len(concepts), (CONCEPTS // 2 - EVERYDAY,))
        chosen = torch.cat(
            [shown.topk(CONCEPTS // 2).indices, everyday[torch.randint(len(everyday), (EVERYDAY,))], anything]
        ).unique()

        plain = (photo == photo[:, :1]).all(dim=1)  # labels speak of whole photos, not of mosaics
        known = plain & labels.labelled[photo[:, 0]]
        positive, unknown = labels.positive[photo[known, 0]], labels.unknown[photo[known, 0]]  # (B', L)
        used = positive.any(dim=0).nonzero().squeeze(1)

        student.visual.conv1.train(not args.fixed_stem)  # the statistics of its batch norm
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cls, patches = student.embed_images(features, None if whole else pick)
        noisy = torch.cat([concept_targets[chosen], label_targets[used]])
        noisy = F.normalize(
            noisy + 0.25 * torch.randn_like(noisy) / noisy.shape[-1] ** 0.5, dim=-1
        )  # the text tower will err
        embedded = student.embed_names(noisy)
        in_loss = patches[:, pick] if whole else patches
        concept_logits = student.logits(in_loss, embedded[: len(chosen)])  # (B, P, K)
        patch_loss = F.binary_cross_entropy_with_logits(concept_logits, (evidence @ leaves[:, chosen]).clamp(0, 1))
        view_target = 1 - (1 - (image_probabilities @ leaves[:, chosen]).clamp(0, 1)).prod(dim=1)
        view_target = torch.where(
            plain[:, None], (image_probabilities[:, 0] @ leaves[:, chosen]).clamp(0, 1), view_target
        )
        cls_loss = F.binary_cross_entropy_with_logits(student.logits(cls, embedded[: len(chosen)]), view_target)

        label_loss = torch.zeros(())
        if len(used) and known.any():
            label_embeddings = embedded[len(chosen) :]
            best = (
                student.logits(patches[known], label_embeddings)
                .topk(patches.shape[1] * 8 // 100, dim=1)
                .values.mean(dim=1)
            )  # (B', L')
            true = positive[:, used].float()
            weight = torch.where(true > 0, 1.0, 0.1) * (~unknown[:, used]).float()
            both = torch.stack([best, student.logits(cls[known], label_embeddings)])
            label_loss = (
                F.binary_cross_entropy_with_logits(both, true.expand_as(both), reduction="none") * weight
            ).sum() / (2 * weight.sum())
        loss = patch_loss + 0.5 * cls_loss + 0.05 * label_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"step {step}, patches {patch_loss.item():.4f}, CLS {cls_loss.item():.4f}, labels {label_loss.item():.3f}, "
                  f"scale {student.logit_scale.exp().item():.1f}, bias {student.logit_bias.item():.2f}, "
                  f"{elapsed:.0f} of {budget:.0f} s", flush=True)  # fmt: skip
        if step % 100 == 0:
            elapsed = time.time() - start
            torch.save({"student": student.state_dict(), "optimizer": optimizer.state_dict(), "elapsed": elapsed, "step": step},
                       checkpoint_file.with_suffix(".tmp"))  # fmt: skip
            checkpoint_file.with_suffix(".tmp").replace(checkpoint_file)
            print(probe(student, targets), flush=True)
    torch.save(
        {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "elapsed": budget, "step": step},
        checkpoint_file,
    )
    print(probe(student, targets), flush=True)


if __name__ == "__main__":
    main()
