"""Rollouts: the packed tensors hold the same as plain lists, and inconsistent or damaged ones are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_disco.data.rollouts import Rollouts
from nemo_disco.runtime.errors import UserError

PROMPTS = [[1, 2], [1, 2], [3], [4, 5, 6]]
RESPONSES = [[10, 11, 12], [], [20], [30, 31]]
LOG_PROBS = [[-1.0, -2.0, -3.0], [], [-4.0], [-5.0, -6.0]]


@pytest.fixture
def rollouts():
    packed = Rollouts.pack(PROMPTS, RESPONSES, LOG_PROBS, [7, 7, 8, 9], [False, False, True, False], [5, 5, 6, 5], 9)
    return packed.with_columns({"length_before": torch.tensor([4, 4, 0, 7])})


def equal(a, b):
    """Whether two Rollouts have the same values, types and columns."""
    if a.max_response_length != b.max_response_length or a.columns.keys() != b.columns.keys():
        return False
    names = [name for name in Rollouts.__annotations__ if name not in ("max_response_length", "columns")]
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    pairs += [(a.columns[name], b.columns[name]) for name in a.columns]
    return all(x is y or (torch.equal(x, y) and x.dtype == y.dtype) for x, y in pairs)


def test_packed_rollouts_return_their_parts(rollouts):
    assert len(rollouts) == 4 and rollouts.weight_versions.tolist() == [5, 5, 6, 5]
    assert [rollouts.prompt(i).tolist() for i in range(4)] == PROMPTS
    assert [rollouts.response(i).tolist() for i in range(4)] == RESPONSES
    assert rollouts.tokens.tolist() == [1, 2, 10, 11, 12, 1, 2, 3, 20, 4, 5, 6, 30, 31]
    assert rollouts.total_lengths.tolist() == [5, 2, 2, 5]
    assert rollouts.truncated.tolist() == [False, False, True, False]
    assert rollouts.rewards.tolist() == [0.0] * 4 and not rollouts.correct.any()


def test_token_index_follows_the_order_of_its_argument(rollouts):
    assert rollouts.token_index([3, 1, 0]).tolist() == [4, 5, 0, 1, 2]
    assert rollouts.generation_log_probs[rollouts.token_index([2, 3])].tolist() == [-4.0, -5.0, -6.0]
    assert rollouts.token_index([]).tolist() == []


def test_select_equals_packing_only_the_selected_responses(rollouts):
    indices = [3, 1, 0]
    expected = Rollouts.pack(
        [PROMPTS[i] for i in indices],
        [RESPONSES[i] for i in indices],
        [LOG_PROBS[i] for i in indices],
        [9, 7, 7],
        [False] * 3,
        [5] * 3,
        9,
    ).with_columns({"length_before": torch.tensor([7, 4, 4])})
    selected = rollouts.select(indices)
    assert equal(selected, expected)
    assert equal(rollouts.select(torch.tensor(indices)), expected)
    assert equal(Rollouts.concatenate([rollouts.select([3]), rollouts.select([1, 0])]), expected)
    responses = [np.array(r, dtype=np.int64) for r in RESPONSES]
    log_probs = [np.array(lp, dtype=np.float32) for lp in LOG_PROBS]
    by_arrays, by_lists = (
        Rollouts.pack(PROMPTS, *parts, [7, 7, 8, 9], [False] * 4)
        for parts in ((responses, log_probs), (RESPONSES, LOG_PROBS))
    )
    assert equal(by_arrays, by_lists)


def test_correct_is_reward_above_the_threshold(rollouts):
    graded = rollouts.with_rewards([0.2, 1.0, 0.5, 0.7])
    assert graded.rewards.tolist() == [0.2, 1.0, 0.5, 0.7] and graded.rewards.dtype == torch.float64
    assert graded.correct.tolist() == [False, True, False, True]
    assert rollouts.with_rewards([0.2, 1.0, 0.5, 0.7], threshold=0.1).correct.all()
    assert not rollouts.correct.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_named(rollouts, bad):
    with pytest.raises(ValueError, match=r"reward of response 2 \(question 8\) is -?(nan|inf); rewards must be finite"):
        rollouts.with_rewards([0.0, 1.0, bad, bad])


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("rewards", torch.zeros(3), "rewards has 3 entries for 4 responses"),
        ("question_ids", torch.zeros(5), "question_ids has 5 entries for 4 responses"),
        ("columns", {"height": torch.zeros(3)}, "height has 3 entries for 4 responses"),
        ("tokens", torch.zeros(13), "13 tokens, but the lengths add up to 14"),
        ("generation_log_probs", torch.zeros(7), "7 log-probs for 6 response tokens"),
    ],
)
def test_parts_of_inconsistent_sizes_are_refused(rollouts, field, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(rollouts, **{field: value})


def test_saved_rollouts_are_loaded_unchanged(rollouts, tmp_path):
    graded = rollouts.with_rewards([0.2, 1.0, 0.5, 0.7])
    graded.save(tmp_path / "r.safetensors")
    loaded = Rollouts.load(tmp_path / "r.safetensors")
    assert equal(loaded, graded)
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_the_engines_routes_stay_with_their_tokens(dtype, tmp_path):
    """Two layers, of which a token of id n goes through expert n of the one and n + 1 of the other."""
    ids = [np.array([*p, *r][:-1], dtype) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    routes = [np.stack([x, x + 1], 1)[..., None] for x in ids]
    ones = [1] * 4
    packed = Rollouts.pack(PROMPTS, RESPONSES, LOG_PROBS, ones, [False] * 4, routes=routes)
    packed.select([3, 1, 0]).save(tmp_path / "r.safetensors")
    joined = Rollouts.concatenate([packed, Rollouts.load(tmp_path / "r.safetensors")])
    assert len(joined) == 7 and joined.routes.dtype == torch.from_numpy(ids[0]).dtype
    last = torch.zeros(len(joined.tokens), dtype=torch.bool)
    last[joined.token_offsets[1:] - 1] = True
    expected = torch.stack([joined.tokens, joined.tokens + 1], 1)[..., None].masked_fill(last[:, None, None], 0)
    assert torch.equal(joined.routes.long(), expected)
    with pytest.raises(ValueError, match="routes of 13 tokens for 14 tokens"):
        replace(packed, routes=packed.routes[1:])
    save_file(load_file(tmp_path / "r.safetensors") | {"routes": torch.zeros(9, 2)}, tmp_path / "r.safetensors")
    with pytest.raises(UserError, match=r"routes is torch.float32 of 2 dimensions, not torch.int16 of 3"):
        Rollouts.load(tmp_path / "r.safetensors")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_file_that_is_not_rollouts_is_named(tmp_path, content):
    (tmp_path / "r.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.safetensors: not a rollouts file"):
        Rollouts.load(tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("tokens", -1, r"tokens\[0\] is -1"),
        ("tokens", 10**9, r"tokens\[0\] is 1e\+09"),
        ("prompt_lengths", -1, r"prompt_lengths\[0\] is -1"),
        ("prompt_lengths", 0, r"prompt_lengths\[0\] is 0"),
        ("response_lengths", -2, r"response_lengths\[0\] is -2"),
        ("rewards", float("nan"), r"rewards\[0\] is nan"),
        ("generation_log_probs", float("-inf"), r"generation_log_probs\[0\] is -inf"),
        ("tokens", None, "tokens is torch.float32 of 1 dim"),
        ("rewards", None, "rewards is torch.float32 of 1 dim"),
    ],
)
def test_a_file_of_impossible_rollouts_is_refused(tmp_path, name, value, complaint):
    path = tmp_path / "r.safetensors"
    rollouts = Rollouts.pack([[1, 2]], [[3, 4]], [[-0.5, -0.5]], [0], [False])
    rollouts.save(path)
    assert len(Rollouts.load(path, vocabulary=5)) == 1
    tensors = load_file(path)
    if value is None:
        tensors[name] = tensors[name].float()
    else:
        tensors[name][0] = value
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"r\.safetensors: not a rollouts file \({complaint}.*remove it") as error:
        Rollouts.load(path, vocabulary=5)
    assert "\n" not in str(error.value)
