"""On a GPU, outputs and gradients equal those on a CPU. The tests are skipped without a GPU."""

import pytest
import torch

from ldvc.checkpoint import load_checkpoint
from ldvc.config import DECODERS
from ldvc.modeling.attention import attend
from ldvc.modeling.clip import build_clip
from recipes.lite.tune_tower import Trunk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
NAMES = ["dog", "grass", "sky", "cup"]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("side", [320, 448, 512])  # regions with and without padding use different kernels of attention
@pytest.mark.parametrize("decoder", DECODERS)
def test_outputs_and_gradients_of_a_decoder_equal_those_on_a_cpu(decoder: str, side: int, half: bool) -> None:
    model, _ = load_checkpoint("lite", decoder=decoder)
    torch.manual_seed(0)
    images = torch.randn(4, 3, side, side)
    logits, gradients = {}, {}
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            output = model(images.to(device), NAMES).mask_logits.float()
        output.square().mean().backward()
        logits[device] = output.detach().cpu()
        gradients[device] = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(logits["cuda"], logits["cpu"], atol=0.5 if half else 0.02, rtol=0.1 if half else 1e-2)
    assert gradients["cuda"].keys() == gradients["cpu"].keys()
    for name, expected in gradients["cpu"].items():
        found = gradients["cuda"][name]
        assert found.isfinite().all(), name
        off = (found - expected).norm() / expected.norm().clamp(min=1e-6)
        assert off < (0.3 if half else 0.05), f"{name}: {off:.3f}"


@pytest.mark.parametrize("side", [336, 480])
def test_outputs_and_gradients_of_the_trunk_equal_those_on_a_cpu(side: int) -> None:
    stem, images = build_clip("lite").visual.conv1, torch.randn(2, 3, side, side)
    found = {}
    for device in ("cpu", "cuda"):
        trunk = Trunk(stem).to(device)
        features = trunk.late(trunk.early(images.to(device)), (side // 24, side // 24))
        features.square().mean().backward()
        found[device] = [features.detach().cpu(), *(p.grad.cpu() for p in trunk.stages.parameters())]
    for expected, tensor in zip(found["cpu"], found["cuda"], strict=True):
        assert tensor.isfinite().all()
        assert (tensor - expected).norm() / expected.norm().clamp(min=1e-6) < 0.05


def test_training_does_not_use_cudnns_attention() -> None:
    query = torch.randn(8, 4, 16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.rand(8, 1, 1, 16, device="cuda") < 0.9
    mask[..., 0] = True
    for each in (None, mask):
        assert "Cudnn" not in type(attend(query, query, query, mask=each).grad_fn).__name__
