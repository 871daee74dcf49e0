"""The flash path of attention on packed sequences, with a stand-in for the kernel, which needs a GPU."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import flash
import pytest
import torch
from tiny_models import model_config, random_rollouts, save_model

from nemo_disco.policy import attention, parallel
from nemo_disco.policy.attention import PackedSequences
from nemo_disco.policy.policy import Policy


@pytest.mark.parametrize("long_from", [None, 8])
def test_the_flash_path_gives_the_same_log_probs_and_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_from: int | None
) -> None:
    """Sequences of at least `long_from` tokens are computed one by one."""
    monkeypatch.setattr(attention, "LONG_FROM", long_from)
    single_lengths = []
    attend = attention.PackedCausalAttention._attend_alone
    monkeypatch.setattr(
        attention.PackedCausalAttention,
        "_attend_alone",
        lambda *qkv: single_lengths.append(len(qkv[1])) or attend(*qkv),
    )
    config = model_config(save_model(tmp_path, "qwen2", tied=True))
    rollouts, results = random_rollouts(), []
    for use_flash in (False, True):
        if use_flash:
            flash.install_stand_in(monkeypatch)
        parallel.start(config)
        policy = Policy(config, dtype=torch.float64)
        log_probs, _ = policy.log_probs(rollouts)
        policy.accumulate(rollouts, lambda _, values: values.log_probs)
        results.append((log_probs, dict(policy.named_gradients())))
    (expected, gradients), (flash_log_probs, flash_gradients) = results
    torch.testing.assert_close(flash_log_probs, expected, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(flash_gradients[name], gradient, rtol=1e-10, atol=1e-12)
    longer = set(single_lengths)
    assert not longer if long_from is None else len(longer) > 1 and min(longer) >= long_from


def test_transformer_engine_gets_whole_sequences_on_every_rank() -> None:
    for context_size in (1, 2):
        packed = PackedSequences.from_lengths([4, 8], context_rank=context_size - 1, context_size=context_size)
        assert packed.whole.qkv_format == "thd"
        assert packed.whole.cu_seqlens_q.tolist() == packed.whole.cu_seqlens_kv.tolist() == [0, 4, 12]
        assert packed.whole.max_seqlen_q == packed.whole.max_seqlen_kv == 8
        assert packed.whole.cu_seqlens_q_padded is None


def test_the_layers_move_no_tensor_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to a GPU from ordinary memory would wait for the GPU, in the middle of the micro-batches."""
    for context_size in (1, 2):
        packed = PackedSequences.from_lengths([4, 8], context_size=context_size)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("a tensor is moved inside the layers"))
            assert packed.whole.cu_seqlens_q is packed.starts


@pytest.mark.parametrize(("width", "supported"), [(64, True), (128, True), (256, True), (100, False), (264, False)])
def test_the_kernel_supports_head_widths_that_are_multiples_of_eight(width: int, supported: bool) -> None:
    query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(5, 4, width))
    assert attention.has_flash_kernel(query) == supported  # type: ignore[arg-type]


def test_torchs_varlen_attention_has_the_parameters_that_are_passed() -> None:
    """torch 2.11 (torch/nn/attention/varlen.py): return_aux, scale, window_size; 2.13 has enable_gqa beside them."""
    q, k, starts = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    call = (q, k, k, starts, starts, 3, 3)
    inspect.signature(attention.varlen_attn).bind(*call, scale=1.0, window_size=(-1, 0), **attention._GROUPED)
