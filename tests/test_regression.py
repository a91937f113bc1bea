"""What the bundled weights answer about the example photos, against `tests/data/lite_regression.npz`.

After a change that is meant to change the answers (other weights, another size): python -m tests.test_regression
"""

import json
from pathlib import Path

import numpy as np

from ldvc import Predictor
from ldvc.bundled import ASSETS

EXAMPLES = ASSETS / "examples"
STORED = Path(__file__).parent / "data" / "lite_regression.npz"
DECODERS = ("ldvc", "zegclip")


def answers() -> dict[str, np.ndarray]:
    """"PHOTO DECODER labels" -> uint8 (H, W), 255 = none of these; "PHOTO DECODER scores" -> float16 (C, h, w), per patch."""
    first, found = Predictor.from_pretrained("lite", device="cpu"), {}
    predictors = [first.sibling(decoder) for decoder in DECODERS]
    for example in json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8")):
        state = first.encode_image(EXAMPLES / example["file"])
        for predictor in predictors:
            result = predictor.segment(example["names"], image=state)
            key = f"{example['file']} {predictor.decoder}"
            found[f"{key} labels"] = result.labels.astype(np.uint8)  # -1 becomes 255
            found[f"{key} scores"] = result.scores_at(result.grid).astype(np.float16)
    return found


def test_answers_are_the_stored_ones() -> None:
    """On the machine that stored them, to the pixel. Another processor may round a logit otherwise at a border."""
    found = answers()
    with np.load(STORED) as stored:
        assert set(stored) == set(found)
        for key, values in found.items():
            if key.endswith("labels"):
                assert (stored[key] == values).mean() > 0.9995, key
            else:
                np.testing.assert_allclose(values.astype(float), stored[key].astype(float), atol=2e-3, err_msg=key)


if __name__ == "__main__":
    np.savez_compressed(STORED, **answers())
