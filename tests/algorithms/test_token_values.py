"""TokenValues keeps the token values of the responses that are saved, by their index in the step."""

import numpy as np
import torch

from nemo_disco.algorithms.journal import TokenValues
from nemo_disco.algorithms.step import MiniBatchResult
from nemo_disco.data.rollouts import Rollouts

LENGTHS = [3, 0, 2, 4]


def test_values_are_kept_for_the_responses_to_save():
    rollouts = Rollouts.pack(
        [[1]] * 4, [[5] * n for n in LENGTHS], [[0.0] * n for n in LENGTHS], [7, 7, 8, 8], [False] * 4
    )
    weights, log_probs = torch.randn(9, dtype=torch.float64), torch.randn(9)
    old = torch.randn(9)
    values = TokenValues(range(1, 4))
    for responses in (torch.tensor([3, 0]), torch.tensor([1, 2])):
        index = rollouts.token_index(responses)
        result = MiniBatchResult({}, log_probs[index], weights[index])
        values.add(responses, rollouts.select(responses), result, old[index])
    assert sorted(values.by_response) == [1, 2, 3]
    for row in (1, 2, 3):
        index = rollouts.token_index([row])
        mini_batch = sum(LENGTHS[i] for i in ((3, 0) if row == 3 else (1, 2)))
        np.testing.assert_allclose(values.by_response[row].weights, -mini_batch * weights[index])
        np.testing.assert_allclose(values.by_response[row].log_ratios, (log_probs.double() - old.double())[index])


def test_a_mini_batch_of_other_responses_leaves_nothing():
    rollouts = Rollouts.pack([[1]], [[5]], [[0.0]], [7], [False])
    values = TokenValues(range(0))
    values.add(torch.tensor([0]), rollouts, MiniBatchResult({}, torch.zeros(1), torch.ones(1)), torch.zeros(1))
    assert values.by_response == {}
