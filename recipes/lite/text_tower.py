"""Step 3 of lite: the text tower learns MiniLM's embedding of every name.

    python -m recipes.lite.text_tower --work runs/lite_recipe --minutes 15

A small open_clip text transformer encodes a name in a template. Its end token, mapped to width 384, learns the target
of step 2. Token embeddings start as principal components of MiniLM's embeddings of the tokens' texts, so that words
that no name contains have a meaning, too. The log prints how many of 1,000 held-out nouns are nearest to their own
target. Writes `text.pt` every 200 steps and resumes from it.
"""

import json
import random

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from ldvc.modeling.towers import run_block
from recipes.lite.steps import Training, options_of, read_json
from recipes.lite.text_targets import CLASS_LIST_NAMES, sentence_embeddings
from recipes.lite.wordnet import WordNet

TEMPLATES = {  # template -> sampling weight
    "a photo of a {}.": 5, "{}": 1, "a {}": 1, "the {}.": 1, "a photo of the {}.": 1, "photo of {}": 1,
}  # fmt: skip
TARGET_WIDTH = 384
BATCH = 512
LEARNING_RATE = 1.5e-3
ARCHITECTURE = read_json("architecture")


class TextStudent(nn.Module):
    """open_clip's text tower with a projection to the teacher's width."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = open_clip.CLIP(**ARCHITECTURE["architecture"])
        del self.clip.visual
        width = self.clip.ln_final.weight.shape[0]
        self.clip.text_projection = nn.Parameter(torch.randn(width, TARGET_WIDTH) * width**-0.5)

    def forward(self, tokens: Tensor, prefix_length: int = 1) -> Tensor:
        """(B, 24) token ids, whose first `prefix_length` are the same in all rows -> (B, 384).

        Attention is causal, so the shared prefix is computed once for the whole batch, and tokens behind the longest name are
        left out. That halves the time.
        """
        clip, p = self.clip, prefix_length
        end = tokens.argmax(dim=-1)  # the end token has the highest id
        n = int(end.max()) + 1
        prefix = clip.token_embedding(tokens[:1, :p]) + clip.positional_embedding[:p]  # (1, p, width)
        names = clip.token_embedding(tokens[:, p:n]) + clip.positional_embedding[p:n]  # (B, n - p, width)
        causal = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril()
        for block in clip.transformer.resblocks:
            names = run_block(block, names, context=prefix, mask=causal[p:])
            prefix = run_block(block, prefix, mask=causal[:p, :p])
        return clip.ln_final(names[torch.arange(len(names)), end - p]) @ clip.text_projection


def initial_token_embeddings(tokenizer: SimpleTokenizer, width: int) -> Tensor:
    """(vocabulary, width): principal components of MiniLM's embedding of each token's text, scaled as in CLIP."""
    words = [tokenizer.decode([i]).strip() or "." for i in range(tokenizer.vocab_size)]
    vectors = sentence_embeddings(words)
    vectors = vectors - vectors.mean(dim=0)
    _, _, components = torch.pca_lowrank(vectors, q=width, niter=4)
    projected = vectors @ components
    return 0.03 * projected / projected.std()


def sampling_weights(names: list[str], concept_names: set[str], wordnet: WordNet) -> Tensor:
    """(N,) sampling weights of the names: class lists and concepts most, then short nouns, plurals and phrases least."""
    nouns = set(wordnet.common_nouns)

    def weight(name: str) -> float:
        if name in CLASS_LIST_NAMES or name in concept_names:
            return 12.0
        if name not in nouns:
            return 0.7  # a plural or a phrase
        return 2.0 if " " not in name and len(name) <= 7 else 1.0

    return torch.tensor([weight(name) for name in names])


def main() -> None:
    args = options_of(__doc__, minutes=15.0)
    names: list[str] = json.loads((args.work / "names.json").read_text())
    targets = torch.from_numpy(np.load(args.work / "targets.npy")).float()
    wordnet = WordNet()
    concept_names = {c["name"] for c in json.loads((args.work / "concepts.json").read_text())}
    weights = sampling_weights(names, concept_names, wordnet)
    row = {name: i for i, name in enumerate(names)}
    nouns = [n for n in wordnet.common_nouns if weights[row[n]] < 12.0]
    held_out = random.Random(0).sample(nouns, 1000)
    held_out_rows = torch.tensor([row[name] for name in held_out])
    weights[held_out_rows] = 0
    plurals = [row[plural] for name in held_out if (plural := wordnet.plural(name)) in row]
    weights[[each for each in plurals if weights[each] < 1]] = 0

    torch.manual_seed(0)
    tokenizer = SimpleTokenizer(context_length=24)
    tokens = torch.stack([tokenizer([t.format(n) for n in names]) for t in TEMPLATES])  # (templates, N, 24)
    prefix_lengths = [1 + len(tokenizer.encode(t.split("{}")[0])) for t in TEMPLATES]
    template_weights = torch.tensor([float(n) for n in TEMPLATES.values()])

    student, file = TextStudent(), args.work / "text.pt"
    if not file.exists():
        embedding = student.clip.token_embedding
        embedding.weight.data = initial_token_embeddings(tokenizer, embedding.embedding_dim)
    groups = [{"params": student.parameters(), "weight_decay": 0.01}]
    training = Training(file, student, groups, rate=LEARNING_RATE, minutes=args.minutes)

    @torch.inference_mode()
    def evaluate() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = F.normalize(student(tokens[0, held_out_rows]).float(), dim=-1)
        true = targets[held_out_rows]
        nearest = (predicted @ true.T).argmax(dim=-1) == torch.arange(len(held_out))
        cosine = (predicted * true).sum(-1).mean()
        print(f"held-out nouns: own target nearest {nearest.float().mean():.3f}, cosine {cosine:.3f}", flush=True)

    for _ in training:
        # Names of 8 batches are sorted by length, so that there is little padding.
        pool = torch.multinomial(weights, 8 * BATCH, replacement=True)
        order = tokens[0, pool].argmax(dim=-1).argsort()
        for chunk in order.view(8, BATCH)[torch.randperm(8)]:
            t = int(torch.multinomial(template_weights, 1))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                predicted = student(tokens[t, pool[chunk]], prefix_lengths[t])
            predicted = F.normalize(predicted.float(), dim=-1)
            true = targets[pool[chunk]]
            # each prediction should be similar to its target, and to the other targets as its target is
            relation = F.kl_div(
                (20 * predicted @ true.T).log_softmax(-1), (20 * true @ true.T).softmax(-1), reduction="batchmean"
            )
            training.learn((1 - (predicted * true).sum(-1)).mean() + 0.2 * relation)
        if training.step % 200 == 0:
            evaluate()
    evaluate()


if __name__ == "__main__":
    main()
