"""The Triton kernels in Triton's interpreter, on a CPU, against float64. `make test-triton` runs these.

Half precision is tested in float16: the interpreter multiplies the bits of bfloat16 as if they were integers.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nemo_disco.policy import log_probs as log_probs_module
from nemo_disco.policy.log_probs import token_log_probs

pytestmark = pytest.mark.triton

TEMPERATURE = 0.6
# Multiples of no block: tokens, vocabulary and width all end inside one.
TOKENS, VOCABULARY, WIDTH = 21, 75, 40
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the kernels, with small blocks. token_log_probs uses it in place of the tiled path."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run this by `make test-triton`"
    module = importlib.import_module("nemo_disco.policy.log_probs_kernel")
    small = {"BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_H": 16}
    monkeypatch.setattr(module, "FORWARD", module.FORWARD | small)
    monkeypatch.setattr(module, "BACKWARD", module.BACKWARD | small)
    monkeypatch.setattr(module, "GATHER", module.GATHER | {"BLOCK_N": 4, "BLOCK_H": 16})
    monkeypatch.setattr(module, "_WAVES", 5)
    monkeypatch.setattr(log_probs_module, "_kernel", lambda *_: module)
    monkeypatch.setattr(log_probs_module, "_CPU_TILE", log_probs_module._Tile(16, 48))
    return module


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / 2).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] in float64, from the same (rounded) numbers that the kernel reads."""
    log_p = (hidden.double() @ weight.double().T / TEMPERATURE).log_softmax(-1)
    chosen = log_p.gather(1, targets.view(len(hidden), -1)).view(targets.shape)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("entropies", "splits_first", "per_token"), [(False, True, 0), (True, True, 0), (True, False, 0), (True, True, 5)]
)
def test_kernels_equal_float64(
    dtype: torch.dtype,
    entropies: bool,
    splits_first: bool,
    per_token: int,
    kernel: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values agree within float32's rounding. So do gradients, except that half precision rounds them on their way.

    per_token: number of targets of a token, some of them equal; 0: one, as a vector.
    """
    monkeypatch.setattr(kernel, "SPLITS_FIRST", splits_first)
    generator = torch.Generator().manual_seed(5)
    hidden, weight, targets = inputs(dtype)
    if per_token:
        targets = torch.randint(VOCABULARY, (TOKENS, per_token), generator=generator)
        targets[:, 1] = targets[:, 0]
    weights = [torch.randn(shape, generator=generator) for shape in (targets.shape, (TOKENS,))]
    outputs = token_log_probs(hidden, weight, targets, temperature=TEMPERATURE, entropies=entropies)
    expected_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = reference(*expected_inputs, targets)
    total, expected_total = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for actual, exact, w in zip(outputs, expected, weights, strict=True):
        if actual is not None:
            assert relative_error(actual.detach(), exact.detach()) < 2e-6
            total, expected_total = total + (w * actual).sum(), expected_total + (w.double() * exact).sum()
    total.backward()
    expected_total.backward()
    for actual, exact in zip((hidden, weight), expected_inputs, strict=True):
        assert actual.grad is not None and exact.grad is not None
        assert relative_error(actual.grad, exact.grad) < 4 * TOLERANCE[dtype]


def test_the_vocabulary_is_shared_out_and_merged(kernel: ModuleType) -> None:
    hidden, weight, targets = (x.detach() for x in inputs(torch.float32))
    stats = kernel.statistics(hidden, weight, targets[:, None], 1.0, True)
    assert stats.shape == (3, 4, TOKENS)
    merged = log_probs_module._merge(stats)
    torch.testing.assert_close(merged[0], (hidden @ weight.T).amax(1))
    torch.testing.assert_close(merged[3], (hidden @ weight.T).gather(1, targets[:, None])[:, 0])


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(torch.float32)
    outputs = token_log_probs(hidden * 1e3, weight, targets, temperature=TEMPERATURE, entropies=True)
    expected = reference(hidden * 1e3, weight, targets)
    for actual, exact in zip(outputs, expected, strict=True):
        assert actual is not None
        # Logits of 2e4 are rounded by 1e-3 each, and the target's is added up in another order than the others.
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=4e-3)


def test_padding_rows_and_foreign_targets() -> None:
    """Padding rows have no probability. A target outside the vocabulary gets NaN: to refuse it, the CPU would have to
    wait for the GPU."""
    hidden, weight, targets = inputs(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_probs_module, "_is_on_host", lambda _: False)
        targets[3] = VOCABULARY - 1
        outputs, _ = token_log_probs(hidden, weight, targets, temperature=TEMPERATURE, vocab_size=VOCABULARY - 5)
    targets[3] = 0
    expected = reference(hidden, weight[:-5], targets.clamp(max=VOCABULARY - 6))[0]
    assert outputs[3].isnan()
    inside = targets < VOCABULARY - 5
    inside[3] = False
    torch.testing.assert_close(outputs[inside].double(), expected[inside], rtol=1e-5, atol=1e-5)
