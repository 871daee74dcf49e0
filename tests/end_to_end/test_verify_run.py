"""`nemo-disco verify` on real processes: the same mini-batch has the same gradient at every layout, hinge active."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from commands import QUICKSTART
from safetensors.torch import load_file, save_file

from nemo_disco.data.rollouts import Rollouts

# theta moved far enough from theta_old for KL to exceed delta: the constraint's share of the gradient is not zero.
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
def alone(commands, tmp_path_factory):
    """The files of one process: rollouts, written, and the gradient."""
    directory = tmp_path_factory.mktemp("verify")
    files = (f"verify.rollouts={directory}/rollouts", f"verify.save_gradients={directory}/gradients")
    return directory, commands("verify", *EXACT, *files).ok()


def said(done, name):
    return float(re.search(rf"^{name}\s+(\S+)", done.out, re.MULTILINE)[1])


def relative(mine, theirs):
    """Of the whole gradient, and of the tensor that differs most."""
    assert mine.keys() == theirs.keys()
    off = {name: float((mine[name] - theirs[name]).norm()) for name in theirs}
    norms = {name: float(theirs[name].norm()) for name in theirs}
    whole = sum(x**2 for x in off.values()) ** 0.5 / sum(x**2 for x in norms.values()) ** 0.5
    return whole, max(off[name] / norms[name] for name in theirs)


def test_the_constraint_acts_and_the_engine_agrees(alone):
    _, done = alone
    assert said(done, "policy/kl") > 1e-9 and said(done, "constraint/active") == 1
    assert said(done, "reward/mean") > 0 and said(done, "gradient norm") > 0
    assert said(done, r"mismatch max \|d\|") < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_gradient(layout, alone, commands, tmp_path):
    directory, first = alone
    ranks, overrides = LAYOUTS[layout]
    files = (f"verify.rollouts={directory}/rollouts", f"verify.save_gradients={tmp_path}/gradients")
    done = commands("verify", *EXACT, *overrides, *files, ranks=ranks).ok()
    mine, theirs = load_file(tmp_path / "gradients"), load_file(directory / "gradients")
    assert {g.dtype for g in mine.values()} == {torch.float64}
    whole, worst = relative(mine, theirs)
    assert whole < 1e-9 and worst < 1e-9
    assert said(done, "policy/kl") == pytest.approx(said(first, "policy/kl"), rel=1e-5)  # six digits are printed


def test_the_same_rollouts_twice_give_the_same_gradient_bit_for_bit(alone, commands, tmp_path):
    directory, _ = alone
    files = (f"verify.rollouts={directory}/rollouts", f"verify.save_gradients={tmp_path}/gradients")
    before = (directory / "rollouts").read_bytes()
    commands("verify", *EXACT, *files).ok()
    mine, theirs = load_file(tmp_path / "gradients"), load_file(directory / "gradients")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (directory / "rollouts").read_bytes() == before  # read, not sampled anew


def test_float32_agrees_with_float64(alone, commands, tmp_path):
    directory, _ = alone
    files = (f"verify.rollouts={directory}/rollouts", f"verify.save_gradients={tmp_path}/gradients")
    commands("verify", *EXACT, "verify.dtype=float32", *files).ok()
    whole, _ = relative(
        {n: g.double() for n, g in load_file(tmp_path / "gradients").items()}, load_file(directory / "gradients")
    )
    assert 0 < whole < 1e-4


@pytest.mark.parametrize("key", ["verify.rollouts", "verify.save_gradients"])
def test_a_file_that_cannot_be_written_is_refused_first(key, commands, tmp_path):
    done = commands("verify", f"{key}={tmp_path}/nowhere/file")
    assert done.code == 2
    assert done.err == f"error: {key}={tmp_path}/nowhere/file: there is no directory {tmp_path}/nowhere; make it\n"


def test_a_sequence_of_the_rollouts_over_the_token_budget_is_refused(alone, commands):
    directory, _ = alone
    longest = int(Rollouts.load(directory / "rollouts").total_lengths.max())  # of which the last token is not read
    short = (f"model.token_budget={longest - 2}", "data.max_prompt_length=40", "generation.max_response_length=8")
    done = commands("verify", f"verify.rollouts={directory}/rollouts", *short)
    assert done.code == 2
    assert re.fullmatch(rf"error: .*model\.token_budget.*\b{longest - 1}\b.*\n", done.err), done.err


def test_rows_of_a_model_beyond_its_tokenizer_change_nothing(commands, tmp_path):
    """As Qwen2.5 has them: 9 rows more than tokens, with large logits. One process samples and takes the gradient with
    them, and without; two split them over tensor-parallel ranks."""
    model = tmp_path / "model"
    shutil.copytree(QUICKSTART / "model", model)
    weights = load_file(model / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([table, 3 * table[:9]])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": len(table) + 9}))
    found = []
    more = (f"model.path={model}", "model.tensor_model_parallel_size=2")
    for name, ranks, overrides in (("plain", 1, ()), ("more rows", 1, more[:1]), ("TP2", 2, more)):
        files = (f"verify.rollouts={tmp_path / name}.rollouts", f"verify.save_gradients={tmp_path / name}")
        commands("verify", "verify.dtype=float64", *overrides, *files, ranks=ranks).ok()
        found.append((Rollouts.load(tmp_path / f"{name}.rollouts"), load_file(tmp_path / name)))
    (rollouts, gradients), *others = found
    for their_rollouts, theirs in others:
        assert torch.equal(their_rollouts.tokens, rollouts.tokens)
        of_rows = theirs["model.embed_tokens.weight"]
        assert not of_rows[len(table) :].any()
        whole, _ = relative(theirs | {"model.embed_tokens.weight": of_rows[: len(table)]}, gradients)
        assert whole < 1e-9
