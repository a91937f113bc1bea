"""The benchmark: its clock, its candidates and its tables."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from ldvc.modeling.attention import RoutedSelfAttention
from ldvc.modeling.model import LDVC
from train import benchmark
from train.benchmark import BARE, FullSelfAttention, in_turn, summarize


def test_candidates_run_in_turn_and_warm_up_is_not_counted() -> None:
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 3, "wall")
    assert calls == ["a", "b"] * 4 and [len(values) for values in seconds.values()] == [3, 3]


@torch.no_grad()
def test_full_attention_equals_lcsa_with_all_regions() -> None:
    full, lcsa = FullSelfAttention(32, 4), RoutedSelfAttention(32, 4, regions=4, topk=16, local_conv=False)
    lcsa.load_state_dict(full.state_dict())
    tokens = torch.randn(2, 48, 32)
    torch.testing.assert_close(full(tokens), lcsa(tokens, (6, 8))[0], atol=1e-5, rtol=1e-4)


def content(ldvc: float, lcsa: float) -> dict:
    sides = {side: {"lcsa": [lcsa * (side / 64) ** 2], "full": [(side / 64) ** 4]} for side in (16, 32, 64, 96)}
    return {
        "about": "made up",
        "training": {decoder: {"seconds": [2.0, 4.0, 3.0], "bytes": 5_000_000} for decoder in ("ldvc", "zegclip")},
        "inference": {BARE: {"seconds": [1.0, 1.0, 9.0]}, "ldvc": {"seconds": [ldvc, ldvc, 0.5]}},
        "attention": sides,
    }


def test_summary_names_medians_ratios_and_limits() -> None:
    text, limits = summarize(content(1.2, 0.5))
    assert "| zegclip | 3000.0 | 2000.0 | 1.00 | 5 |" in text and "| ldvc | 1200.0 | 500.0 | 1.20 |" in text
    assert "| 64 x 64 | 500.0 | 500.0 | 1000.0 | 1000.0 | 0.50 |" in text
    assert "tokens^1.00 for LCSA and with tokens^2.00" in text
    assert [round(value, 2) for value, _ in limits.values()] == [1.2, 0.5, 1.0] and "MISSED" not in text
    assert summarize(content(1.3, 0.7))[0].count("MISSED") == 2


def test_it_runs_and_measures_memory_in_a_process_of_its_own(
    tiny_clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(benchmark, "DECODERS", ("ldvc",))  # one process instead of three
    words = ["--clip", str(tiny_clip_folder), "--image_size", "64", "--names", "3", "--prompts", "2", "--rounds", "1"]
    words += ["--grids", "4", "8", "12"]
    benchmark.main([*words, "--output", str(tmp_path / "table")])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "table.json").read_text())
    assert printed.strip() == (tmp_path / "table.md").read_text().strip() and "64 pixels, 3 names" in printed
    assert written["attention"]["8"]["lcsa"][0] > 0 and written["inference"][BARE]["seconds"][0] > 0
    model: LDVC = benchmark.build("ldvc", benchmark.parse(words))
    learnable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert written["training"]["ldvc"]["bytes"] > 3 * 4 * learnable, "gradients and AdamW's two moments at the least"
    with pytest.raises(SystemExit, match="give that as --image_size"):
        benchmark.main([*words, "--sections", "inference", "--image_size", "96"])


def test_check_fails_if_a_limit_is_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    for lcsa, allowed in ((0.5, True), (0.7, False)):
        monkeypatch.setattr(benchmark, "attention", lambda options, lcsa=lcsa: content(1.0, lcsa)["attention"])
        with nullcontext() if allowed else pytest.raises(SystemExit, match="1"):
            benchmark.main(["--sections", "attention", "--check"])
