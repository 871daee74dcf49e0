"""`nemo-disco verify` on real processes: a mini-batch has the same gradient at every layout, with an active hinge."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from commands import QUICKSTART
from safetensors.torch import load_file, save_file

from nemo_disco.data.rollouts import Rollouts

# theta is moved so far from theta_old that KL exceeds delta: the constraint's share of the gradient is not zero.
EXACT = ("verify.dtype=float64", "verify.perturb=1e-3", "algorithm.constraint.delta=1e-9")
LAYOUTS = {
    "DP2": (2, ()),
    "TP2": (2, ("model.tensor_model_parallel_size=2",)),
    "TP2 with SP": (2, ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")),
    "PP2": (2, ("model.pipeline_model_parallel_size=2",)),
    "CP2": (2, ("model.context_parallel_size=2",)),
    "one micro-batch": (1, ("model.token_budget=4096",)),
}


@pytest.fixture(scope="module")
def one_process(commands, tmp_path_factory):
    """`verify` on one process: the directory with its rollouts and its gradient, and the command's result."""
    directory = tmp_path_factory.mktemp("verify")
    files = (f"verify.rollouts={directory}/rollouts", f"verify.save_gradients={directory}/gradients")
    return directory, commands("verify", *EXACT, *files).ok()


def read_figure(result, name):
    """The figure that the command printed under this name."""
    return float(re.search(rf"^{name}\s+(\S+)", result.out, re.MULTILINE)[1])


def relative_differences(actual, expected):
    """Relative difference of the whole gradient, and that of the tensor that differs most."""
    assert actual.keys() == expected.keys()
    differences = {name: float((actual[name] - expected[name]).norm()) for name in expected}
    norms = {name: float(expected[name].norm()) for name in expected}
    whole = sum(x**2 for x in differences.values()) ** 0.5 / sum(x**2 for x in norms.values()) ** 0.5
    return whole, max(differences[name] / norms[name] for name in expected)


def test_the_constraint_acts_and_the_engine_agrees(one_process):
    _, result = one_process
    assert read_figure(result, "policy/kl") > 1e-9 and read_figure(result, "constraint/active") == 1
    assert read_figure(result, "reward/mean") > 0 and read_figure(result, "gradient norm") > 0
    assert read_figure(result, r"mismatch max \|d\|") < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_gradient(layout, one_process, commands, tmp_path):
    directory, first = one_process
    ranks, overrides = LAYOUTS[layout]
    files = (f"verify.rollouts={directory}/rollouts", f"verify.save_gradients={tmp_path}/gradients")
    result = commands("verify", *EXACT, *overrides, *files, "verify.reference=transformers", ranks=ranks).ok()
    assert re.search(r"^transformers +\d+ modules agree; largest relative difference \d", result.out, re.MULTILINE)
    actual, expected = load_file(tmp_path / "gradients"), load_file(directory / "gradients")
    assert {g.dtype for g in actual.values()} == {torch.float64}
    whole, worst = relative_differences(actual, expected)
    assert whole < 1e-9 and worst < 1e-9
    kl = read_figure(first, "policy/kl")  # printed with six digits
    assert read_figure(result, "policy/kl") == pytest.approx(kl, rel=1e-5)


def test_the_same_rollouts_twice_give_the_same_gradient_bit_for_bit(one_process, commands, tmp_path):
    directory, _ = one_process
    files = (f"verify.rollouts={directory}/rollouts", f"verify.save_gradients={tmp_path}/gradients")
    before = (directory / "rollouts").read_bytes()
    commands("verify", *EXACT, *files).ok()
    actual, expected = load_file(tmp_path / "gradients"), load_file(directory / "gradients")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert (directory / "rollouts").read_bytes() == before  # they were read and not sampled anew


def test_float32_agrees_with_float64(one_process, commands, tmp_path):
    directory, _ = one_process
    files = (f"verify.rollouts={directory}/rollouts", f"verify.save_gradients={tmp_path}/gradients")
    commands("verify", *EXACT, "verify.dtype=float32", *files).ok()
    whole, _ = relative_differences(
        {n: g.double() for n, g in load_file(tmp_path / "gradients").items()}, load_file(directory / "gradients")
    )
    assert 0 < whole < 1e-4


@pytest.mark.parametrize("key", ["verify.rollouts", "verify.save_gradients"])
def test_a_file_that_cannot_be_written_is_refused_first(key, commands, tmp_path):
    result = commands("verify", f"{key}={tmp_path}/nowhere/file")
    assert result.code == 2
    assert result.err == f"error: {key}={tmp_path}/nowhere/file: there is no directory {tmp_path}/nowhere; make it\n"


def test_a_sequence_of_the_rollouts_over_the_token_budget_is_refused(one_process, commands):
    directory, _ = one_process
    # The model does not read the last of these tokens.
    longest = int(Rollouts.load(directory / "rollouts").total_lengths.max())
    short = (f"model.token_budget={longest - 2}", "data.max_prompt_length=40", "generation.max_response_length=8")
    result = commands("verify", f"verify.rollouts={directory}/rollouts", *short)
    assert result.code == 2
    assert re.fullmatch(rf"error: .*model\.token_budget.*\b{longest - 1}\b.*\n", result.err), result.err


def test_rows_of_a_model_beyond_its_tokenizer_change_nothing(commands, tmp_path):
    """The embedding has 9 more rows than the tokenizer has tokens, as in Qwen2.5, and these rows give large logits. One
    process samples and computes the gradient without them and with them; two tensor-parallel ranks split them."""
    model = tmp_path / "model"
    shutil.copytree(QUICKSTART / "model", model)
    weights = load_file(model / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, 3 * table[:9]])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": len(table) + 9}))
    results = []
    more = (f"model.path={model}", "model.tensor_model_parallel_size=2")
    for name, ranks, overrides in (("plain", 1, ()), ("more rows", 1, more[:1]), ("TP2", 2, more)):
        files = (f"verify.rollouts={tmp_path / name}.rollouts", f"verify.save_gradients={tmp_path / name}")
        commands("verify", "verify.dtype=float64", *overrides, *files, ranks=ranks).ok()
        results.append((Rollouts.load(tmp_path / f"{name}.rollouts"), load_file(tmp_path / name)))
    (rollouts, gradients), *others = results
    for other_rollouts, other_gradients in others:
        assert torch.equal(other_rollouts.tokens, rollouts.tokens)
        row_gradients = other_gradients["model.embed_tokens.weight"]
        assert not row_gradients[len(table) :].any()
        whole, _ = relative_differences(
            other_gradients | {"model.embed_tokens.weight": row_gradients[: len(table)]}, gradients
        )
        assert whole < 1e-9
