"""token_log_probs agrees with a materialised float64 log_softmax in values and gradients, also with padding; it takes
little memory and refuses inputs that do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_disco.policy import log_probs as module
from nemo_disco.policy.log_probs import token_log_probs

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "log_probs.py"
DTYPES = pytest.mark.parametrize(
    ("dtype", "value_tol", "grad_tol"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-4)]
)


def make_inputs(n: int, vocab: int, h: int, dtype: torch.dtype, spread: float = 6.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [n, h], weight [vocab, h] and targets [n], of which half are the likeliest token.

    The logits have a standard deviation of `spread`.
    """
    generator = torch.Generator().manual_seed(n + vocab + h)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, h, generator=generator, dtype=torch.float64) * spread / h**0.5
    targets = torch.randint(vocab, (n,), generator=generator)
    targets[::2] = (hidden @ weight.T).argmax(1)[::2]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def compute_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs [n] and entropies [n] by their definition, in float64, with all logits in memory."""
    log_p = (hidden.double() @ weight.double().T / temperature).log_softmax(1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute error, relative to the largest expected entry."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def random_weights(n: int) -> tuple[Tensor, Tensor]:
    """Token weights and entropy weights of both signs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, n, generator=generator, dtype=torch.float64).unbind()


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 0.6])
# 1100 tokens and 2300 rows are three tiles of each, the last ones ragged; the other two are smaller than one tile.
@pytest.mark.parametrize(("n", "vocab", "h"), [(1100, 2300, 8), (64, 512, 32), (1, 40, 4)])
def test_values_and_gradients_equal_the_reference(
    n: int, vocab: int, h: int, temperature: float, dtype: torch.dtype, value_tol: float, grad_tol: float
) -> None:
    hidden, weight, targets = make_inputs(n, vocab, h, dtype)
    w, v = random_weights(n)
    for entropy_weight in (0.0, 1.0):
        expected = compute_reference(hidden, weight, targets, temperature)
        expected_grads = torch.autograd.grad(
            (expected[0] * w + entropy_weight * expected[1] * v).sum(), [hidden, weight]
        )
        log_probs, entropy = token_log_probs(
            hidden, weight, targets, temperature=temperature, entropies=bool(entropy_weight)
        )
        loss = (log_probs * w).sum()
        torch.testing.assert_close(log_probs.double(), expected[0], rtol=value_tol, atol=value_tol)
        assert log_probs.dtype == dtype
        if entropy_weight:
            assert entropy is not None
            torch.testing.assert_close(entropy.double(), expected[1], rtol=value_tol, atol=value_tol)
            loss = loss + (entropy * v).sum()
        else:
            assert entropy is None
        for actual, grad in zip(torch.autograd.grad(loss, [hidden, weight]), expected_grads, strict=True):
            assert actual.dtype == dtype and relative_error(actual, grad) < grad_tol


@DTYPES
@pytest.mark.parametrize(("n", "vocab"), [(600, 2300), (3, 5)])
def test_several_targets_of_a_token_equal_the_reference(
    n: int, vocab: int, dtype: torch.dtype, value_tol: float, grad_tol: float
) -> None:
    """Values and gradients of [n, m] log-probs, of which some have the same target and some no gradient."""
    hidden, weight, first = make_inputs(n, vocab, 8, dtype)
    targets = torch.stack([first, (first + 1) % vocab, first, (7 * first) % vocab], 1)
    weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights[: n // 3] = 0
    expected = (hidden.double() @ weight.double().T / 0.7).log_softmax(1).gather(1, targets)
    actual, _ = token_log_probs(hidden, weight, targets, temperature=0.7)
    torch.testing.assert_close(actual.double(), expected, rtol=value_tol, atol=value_tol)
    expected_grads = torch.autograd.grad((expected * weights).sum(), [hidden, weight])
    for grad, wanted in zip(
        torch.autograd.grad((actual * weights).sum(), [hidden, weight]), expected_grads, strict=True
    ):
        assert relative_error(grad, wanted) < grad_tol


def test_gradcheck_through_both_outputs() -> None:
    hidden, weight, targets = make_inputs(4, 7, 3, torch.float64, spread=2.0)

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return token_log_probs(hidden, weight, targets, temperature=0.7, vocab_size=7, entropies=True)

    assert torch.autograd.gradcheck(both, (hidden, weight))


def test_gradient_of_entropy_alone() -> None:
    hidden, weight, targets = make_inputs(30, 40, 5, torch.float64)
    _, v = random_weights(30)
    expected = torch.autograd.grad((compute_reference(hidden, weight, targets, 1.0)[1] * v).sum(), [hidden, weight])
    _, entropy = token_log_probs(hidden, weight, targets, temperature=1.0, entropies=True)
    assert entropy is not None
    for actual, grad in zip(torch.autograd.grad((entropy * v).sum(), [hidden, weight]), expected, strict=True):
        assert relative_error(actual, grad) < 1e-12


def test_on_a_gpu_logits_are_not_rounded_to_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiled path on CUDA, within 2e-3 of float32. torch.mm has out_dtype on CUDA alone: a stand-in is used here."""
    calls = []

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        calls.append(out_dtype)
        product = a.to(out_dtype) @ b.to(out_dtype)
        return product if out is None else out.copy_(product)

    hidden, weight, targets = make_inputs(300, 3000, 64, torch.bfloat16)
    expected = compute_reference(hidden, weight, targets, 0.6)
    gradients = torch.autograd.grad(sum(x.sum() for x in expected), (hidden, weight))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(module, "_CUDA_TILE", module._Tile(128, 1024))
    outputs = token_log_probs(hidden, weight, targets, temperature=0.6, entropies=True)
    grads = torch.autograd.grad(sum(x.sum() for x in outputs), (hidden, weight))  # type: ignore[arg-type, misc]
    bounds = (2e-3, 2e-3, 1e-2, 1e-2)
    for value, reference_value, bound in zip((*outputs, *grads), (*expected, *gradients), bounds, strict=True):
        assert value is not None
        assert float((value.double() - reference_value.double()).norm() / reference_value.double().norm()) < bound
    assert calls and set(calls) == {torch.float32}


def test_bf16_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 625 tiles a bf16 sum is 8% off (measured); in float32 only the rounding of the products is left, 0.5%."""
    monkeypatch.setattr(module, "_CPU_TILE", module._Tile(tokens=32, vocab=16))
    hidden, weight, targets = make_inputs(20_000, 64, 8, torch.bfloat16, spread=1.0)
    expected = compute_reference(hidden, weight, targets, 1.0)
    grads = torch.autograd.grad(expected[0].sum(), [hidden, weight])
    log_probs, _ = token_log_probs(hidden, weight, targets, temperature=1.0)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=0, atol=3e-2)
    for actual, grad in zip(torch.autograd.grad(log_probs.sum(), [hidden, weight]), grads, strict=True):
        assert actual.dtype == torch.bfloat16 and relative_error(actual, grad) < 1e-2


@pytest.mark.parametrize("offset", [-2000.0, 2000.0])
def test_extreme_logits_stay_finite(offset: float) -> None:
    """A large offset to all logits changes nothing; the last column of hidden adds `offset` to each."""
    hidden, weight, targets = make_inputs(20, 1500, 4, torch.float32, spread=3.0)
    column = torch.ones(20, 1)
    shifted = torch.cat([hidden, column], 1).detach().requires_grad_()
    shifted_weight = torch.cat([weight, torch.full((1500, 1), offset)], 1).detach().requires_grad_()
    log_probs, entropy = token_log_probs(shifted, shifted_weight, targets, temperature=1.0, entropies=True)
    expected = compute_reference(hidden, weight, targets, 1.0)
    assert entropy is not None
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=0, atol=2e-3)  # float32 at 2000: 1.2e-4 per logit
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=2e-3)
    (log_probs.sum() + entropy.sum()).backward()
    assert shifted.grad is not None and shifted.grad.isfinite().all()


def test_padding_rows_have_no_probability_and_no_gradient() -> None:
    """Padding with huge logits must not matter; nor must NaN, which uninitialised padding can be."""
    hidden, weight, targets = make_inputs(50, 1100, 6, torch.float64)
    padded = torch.cat([weight.detach(), torch.full((60, 6), torch.nan, dtype=torch.float64)]).requires_grad_()
    w, _ = random_weights(50)
    expected = compute_reference(hidden, weight, targets, 1.0)
    grads = torch.autograd.grad((expected[0] * w).sum(), [hidden, weight])
    log_probs, _ = token_log_probs(hidden, padded, targets, temperature=1.0, vocab_size=1100)
    torch.testing.assert_close(log_probs, expected[0], rtol=1e-12, atol=1e-12)
    actual = torch.autograd.grad((log_probs * w).sum(), [hidden, padded])
    assert relative_error(actual[0], grads[0]) < 1e-12 and relative_error(actual[1][:1100], grads[1]) < 1e-12
    assert not actual[1][1100:].any()


def test_tokens_of_weight_zero_are_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make_inputs(2000, 50, 4, torch.float64)
    w, v = random_weights(2000)
    w[:1300], v[:1200] = 0, 0
    expected = compute_reference(hidden, weight, targets, 1.0)
    grads = torch.autograd.grad((expected[0] * w + expected[1] * v).sum(), [hidden, weight])
    log_probs, entropy = token_log_probs(hidden, weight, targets, temperature=1.0, entropies=True)
    assert entropy is not None
    counts: list[int] = []
    logits = module._Scratch.logits

    def count(self: module._Scratch, hidden: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        counts.append(len(hidden))
        return logits(self, hidden, weight, scale)

    monkeypatch.setattr(module._Scratch, "logits", count)
    actual = torch.autograd.grad((log_probs * w + entropy * v).sum(), [hidden, weight])
    assert sum(counts) == 800
    assert relative_error(actual[0], grads[0]) < 1e-12 and relative_error(actual[1], grads[1]) < 1e-12


def test_frozen_inputs_get_no_gradient_and_nothing_is_kept_without_gradients() -> None:
    hidden, weight, targets = make_inputs(30, 40, 5, torch.float64)
    expected = torch.autograd.grad(compute_reference(hidden, weight, targets, 1.0)[0].sum(), [hidden, weight])
    frozen, _ = token_log_probs(hidden, weight.detach(), targets, temperature=1.0)
    assert relative_error(torch.autograd.grad(frozen.sum(), hidden)[0], expected[0]) < 1e-12
    frozen, _ = token_log_probs(hidden.detach(), weight, targets, temperature=1.0)
    assert relative_error(torch.autograd.grad(frozen.sum(), weight)[0], expected[1]) < 1e-12
    with torch.no_grad():
        states = hidden * 2
        reference_to_states = weakref.ref(states)
        log_probs, _ = token_log_probs(states, weight, targets, temperature=1.0)
        del states
    assert not log_probs.requires_grad and reference_to_states() is None


@pytest.mark.parametrize("loss_of", [lambda x: x.sum(), lambda x: (x * 0).sum()], ids=["no tokens", "no weights"])
def test_no_tokens_or_zero_weights_give_zero_gradients(loss_of: Callable[[Tensor], Tensor]) -> None:
    n = 0 if loss_of(torch.ones(1)) else 9
    hidden, weight = torch.ones(n, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.int64)
    log_probs, entropy = token_log_probs(hidden, weight, targets, temperature=1.0, entropies=True)
    assert entropy is not None and log_probs.shape == entropy.shape == (n,)
    loss_of(log_probs).backward()
    assert hidden.grad is not None and hidden.grad.shape == (n, 4) and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature of log-probs must be positive"),
        ({"targets": torch.tensor([0, 5, 2])}, "below the vocabulary size 5, not 0 to 5"),
        ({"targets": torch.tensor([0, -1, 2])}, "not -1 to 2"),
        ({"targets": torch.tensor([0, 1])}, r"not \(3, 4\), \(6, 4\), \(2,\)"),
        ({"targets": torch.zeros(3)}, "int64 targets, not torch.float32"),
        ({"hidden": torch.zeros(3, 5)}, r"not \(3, 5\), \(6, 4\)"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.bfloat16)}, "one floating dtype"),
        ({"vocab_start": 6}, "does not fit a vocabulary of 5: row 6 and 6 rows per rank, on rank 0 of 1"),
        ({"vocab_size": 7}, "does not fit a vocabulary of 7"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    inputs = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "targets": torch.tensor([0, 4, 2])}
    with pytest.raises(ValueError, match=message):
        token_log_probs(**{**inputs, "temperature": 1.0, "vocab_size": 5, **change})  # type: ignore[arg-type]


def measure(variant: str, tokens: int) -> dict[str, float]:
    """The figures of one variant of the benchmark. It runs in its own process, so that the peak memory is its own."""
    sizes = ["--tokens", str(tokens), "--vocab", "151936", "--hidden", "32"]
    command = [sys.executable, str(BENCHMARK), "--one", variant, *sizes]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_peak_memory_is_under_a_tenth_of_the_logits() -> None:
    """Vocabulary 151,936 and 8,192 tokens, forward and backward through log-probs and entropies."""
    logits = 8192 * 151_936 * 4
    assert measure("tiled_entropies", 8192)["extra_bytes"] < logits / 10
    # The measurement works: plain PyTorch with 1/32 of the tokens needs at least its logits and their gradient.
    assert measure("plain", 256)["extra_bytes"] > 2 * logits / 32
