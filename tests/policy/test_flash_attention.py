"""The flash path of attention on packed sequences: what it hands to the kernel. The kernel itself needs a GPU."""

from __future__ import annotations

from pathlib import Path

import flash
import pytest
import torch
from models import model_config, random_rollouts, save_model

from nemo_disco.policy import parallel
from nemo_disco.policy.attention import PackedSequences
from nemo_disco.policy.policy import Policy


def test_the_flash_path_gives_the_same_log_probs_and_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config(save_model(tmp_path, "qwen2", tied=True))
    rollouts, results = random_rollouts(), []
    for use_flash in (False, True):
        if use_flash:
            flash.pretend(monkeypatch)
        parallel.start(config)
        policy = Policy(config, dtype=torch.float64)
        log_probs, _ = policy.log_probs(rollouts)
        policy.accumulate(rollouts, lambda _, log_probs, __: log_probs)
        results.append((log_probs, dict(policy.named_gradients())))
    (expected, gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-10, atol=1e-12)


def test_transformer_engine_gets_whole_sequences_whatever_the_rank() -> None:
    for context_size in (1, 2):
        packed = PackedSequences.from_lengths([4, 8], context_rank=context_size - 1, context_size=context_size)
        assert packed.whole.qkv_format == "thd"
        assert packed.whole.cu_seqlens_q.tolist() == packed.whole.cu_seqlens_kv.tolist() == [0, 4, 12]
        assert packed.whole.max_seqlen_q == packed.whole.max_seqlen_kv == 8
        assert packed.whole.cu_seqlens_q_padded is None
