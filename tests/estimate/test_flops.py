"""Model FLOPs against a second formula and against what torch counts in transformers' own forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_disco.estimate.flops import TRAINING, forward_flops, peak_flops
from nemo_disco.models.architecture import ARCHITECTURES
from nemo_disco.models.shape import PUBLISHED, ModelShape

SHAPE = ModelShape(3, 64, 96, 8, 2, 8, 130, tied=False, architecture=ARCHITECTURES["qwen2"], max_positions=256)


def assert_torch_counts(shape: ModelShape, model: torch.nn.Module, n: int = 48) -> None:
    """torch counts n^2 pairs a sequence where causal attention has n (n + 1) / 2."""
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.arange(n)[None]).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    masked = 4 * shape.layers * shape.query_width * (n * n - n * (n + 1) // 2)
    expected = forward_flops(shape, [n], predicted=n) + masked
    assert forward.get_total_flops() == expected
    assert forward.get_total_flops() + backward.get_total_flops() == TRAINING * expected


def test_flops_are_torchs_count_but_for_the_half_of_attention_that_is_masked() -> None:
    config = Qwen2Config(
        vocab_size=SHAPE.vocab,
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.ffn,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    assert_torch_counts(SHAPE, Qwen2ForCausalLM(config))


def test_a_token_costs_its_own_experts_alone() -> None:
    shape = replace(SHAPE, architecture=ARCHITECTURES["mixtral"], experts=4, experts_per_token=2)
    config = MixtralConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert_torch_counts(shape, MixtralForCausalLM(config))


def test_a_sliding_window_leaves_out_the_pairs_that_it_hides() -> None:
    window, lengths = 7, [3, 7, 20]
    shape = replace(SHAPE, window=window, windowed=(False, True, True))
    hidden = sum(max(0, i + 1 - window) for n in lengths for i in range(n))
    saved = 4 * shape.query_width * 2 * hidden
    assert forward_flops(SHAPE, lengths, predicted=1) - forward_flops(shape, lengths, predicted=1) == saved


def test_packed_sequences_cost_what_each_costs_alone() -> None:
    lengths = [5, 17, 1, 30]
    alone = sum(forward_flops(SHAPE, [n], predicted=0) for n in lengths)
    assert forward_flops(SHAPE, lengths, predicted=0) == alone
    one_row = forward_flops(SHAPE, [sum(lengths)], predicted=0)
    assert alone < one_row, "one sequence of the same length has more attention than the packed sequences"


def test_flops_are_six_n_and_attention() -> None:
    """Rule of thumb on a published shape: 6 N D for the weights that multiply each token, 6 L d n^2 for attention."""
    shape, n = PUBLISHED["DeepSeek-R1-Distill-Qwen-1.5B"], 8192
    parameters = shape.parameters - shape.embedding_parameters
    expected = 6 * parameters * n + 6 * shape.layers * shape.query_width * n**2
    assert TRAINING * forward_flops(shape, [n], predicted=n) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks_go_by_the_devices_name(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak
