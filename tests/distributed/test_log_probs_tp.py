"""token_log_probs on real tensor-parallel processes gives the same numbers as on one process, at every TP size."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nemo_disco.policy.likely_tokens import find_likely_tokens
from nemo_disco.policy.log_probs import token_log_probs

TOKENS, HIDDEN = 700, 6
# (vocabulary, rows with padding): an even split; padding on part of the last rank; the last rank of TP 4 all padding.
VOCABULARIES = [(2400, 2400), (2397, 2400), (1800, 2400)]


def make_inputs(vocab: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets, and the gradients of the loss by log-probs and by entropies [2, TOKENS]."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    upstream = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    upstream[:, 100:250] = 0
    return hidden, weight, targets, upstream


def compute_values_and_gradients(vocab: int, rows: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Log-probs, entropies, log-probs of the 7 likeliest tokens, and this rank's gradients by the hidden states and by
    its rows of the weight.

    group: the tensor-parallel ranks; None computes all on this process.
    """
    hidden, weight, targets, upstream = make_inputs(vocab, rows)
    ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
    shard = weight.chunk(ranks)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    head = {"tp_group": group, "vocab_start": rank * rows // ranks, "vocab_size": vocab}
    likely = find_likely_tokens(hidden.detach(), shard.detach(), 7, **head)
    assert torch.equal(likely, (hidden.detach() @ weight[:vocab].T).topk(7, 1).indices)
    ids = torch.cat([targets[:, None], likely], 1)
    log_probs, entropies = token_log_probs(hidden, shard, ids, temperature=0.8, entropies=True, **head)
    assert entropies is not None
    loss = (log_probs * upstream[0, :, None] * torch.arange(8)).sum() + (entropies * upstream[1]).sum()
    values = [log_probs[:, 0].detach(), entropies.detach(), log_probs[:, 1:].detach()]
    return [*values, *torch.autograd.grad(loss, [hidden, shard])]


def save_results(rank: int, ranks: int, folder: str) -> None:
    """Compute every case with TP 4, and with TP 2 in each half of the ranks, and save this rank's results."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for tp, group in ((4, dist.group.WORLD), (2, pairs[rank // 2])):
        for i, (vocab, rows) in enumerate(VOCABULARIES):
            *values, grad_hidden, grad_weight = compute_values_and_gradients(vocab, rows, group)
            dist.all_reduce(grad_hidden, group=group)  # as megatron does: each rank has a partial sum
            torch.save([*values, grad_hidden, grad_weight], f"{folder}/tp{tp}_{i}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the results of four processes. With TP 2, ranks in the second group differ from global ranks."""
    folder = tmp_path_factory.mktemp("tp")
    mp.start_processes(save_results, args=(4, str(folder)), nprocs=4, start_method="forkserver")
    return folder


@pytest.mark.parametrize("case", range(len(VOCABULARIES)), ids=[str(v) for v in VOCABULARIES])
@pytest.mark.parametrize(("tp", "first"), [(2, 0), (2, 2), (4, 0)])
def test_equals_one_process(tp: int, first: int, case: int, results: Path) -> None:
    expected = compute_values_and_gradients(*VOCABULARIES[case], None)
    ranks = [torch.load(results / f"tp{tp}_{case}_{rank}.pt") for rank in range(first, first + tp)]
    for rank in ranks:
        for value, expected_value in zip(rank[:4], expected[:4], strict=True):
            assert (value - expected_value).abs().max() < 1e-12 * expected_value.abs().max()
        assert torch.equal(rank[0], ranks[0][0])  # bit for bit, so that all ranks decide alike
    whole = torch.cat([rank[4] for rank in ranks])
    assert (whole - expected[4]).abs().max() < 1e-12 * expected[4].abs().max()
