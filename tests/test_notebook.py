"""The notebook in examples/: its steps, one by one, give what `Predictor.segment` gives."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "ldvc.ipynb"


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(notebook: dict[str, Any]) -> dict[str, Any]:
    """All variables after the last cell. The cells run in the folder of the notebook, as in Jupyter."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():  # restores the setting that the notebook changes
        patch.chdir(NOTEBOOK.parent)
        patch.setattr(sys, "path", [*sys.path])
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), variables)
    return variables


def pictures(figure: Figure) -> int:
    return sum(bool(axis.images) for axis in figure.axes)


def test_the_file_is_a_notebook_without_outputs(notebook: dict[str, Any]) -> None:
    """Format 4.5: https://nbformat.readthedocs.io/en/latest/format_description.html"""
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"].keys() >= {"name", "display_name"}
    cells = notebook["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code"] * (len(cells) // 2)
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        extra = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | extra
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_links_lead_to_files(notebook: dict[str, Any]) -> None:
    links = [link for cell in notebook["cells"] for link in re.findall(r"\]\(([^)]+)\)", "".join(cell["source"]))]
    documents = [link for link in links if link.startswith("../docs/")]
    assert documents and all((NOTEBOOK.parent / link).is_file() for link in documents)


def test_the_steps_are_those_of_the_predictor(found: dict[str, Any]) -> None:
    result = found["result"]
    (features,) = result.features
    torch.testing.assert_close(found["T_new"], features.classes_before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["S"], found["decoded"].mask_logits[0], atol=1e-4, rtol=1e-4)
    assert (found["labels"].numpy() == result.labels).mean() > 0.9999
    np.testing.assert_allclose(found["scores"].numpy(), result.scores, atol=1e-4)
    assert set(np.unique(result.labels)) == {-1, 0, 1, 2}, "the photo shows all names, and none of these"
    np.testing.assert_allclose(found["total"], 1, atol=1e-5)


def test_the_figures(found: dict[str, Any]) -> None:
    names = len(found["names"])
    assert pictures(found["prompts_figure"]) == names * 3
    assert pictures(found["routing_figure"]) == 3
    assert len(found["routing_figure"].axes[0].patches) == 4 + 1, "the frames of four regions and of the patch"
    assert pictures(found["attention_overview"]) == (names + 1) * 4, "the last row is none of these"
    assert pictures(found["masks_figure"]) == 4
    assert pictures(found["none_figure"]) == 3
    assert len(found["embedding_figure"].axes) == 4


def test_what_the_text_says(found: dict[str, Any]) -> None:
    low, middle, high = found["none_shares"]
    assert low == 0 < middle < high
    ldvc, zegclip = (found["space"].decoders[decoder].drift for decoder in ("ldvc", "zegclip"))
    assert ldvc["classes"] == pytest.approx(0, abs=1e-6) and ldvc["patches"] > 0.01
    assert zegclip["patches"] == pytest.approx(0, abs=1e-6) and zegclip["classes"] > 0.01
    without, with_prompts = (found[key][1:].max() for key in ("without_prompts", "with_prompts"))
    assert max(without, with_prompts) < 0.2, "grass and sky have low scores before the decoder"
    assert found["result"].scores[1:].max(axis=(1, 2)).min() > 0.5, "the decoder raises them"
    assert (found["to_dog"] < 0.999).all(), "the adapter gives each photo other embeddings"
