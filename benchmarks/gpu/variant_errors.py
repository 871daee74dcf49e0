"""Errors against float64 of each variant that the sections log_probs, attention and decode time.

Some variants cannot run on a CPU and may never have run when a GPU is first used: Triton's kernels, addmm with
out_dtype, cuDNN's attention, CUDA graphs. Sizes are small, but each variant has several tiles, sequences or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attention_variants
import decoding
import heads
import torch
from setting import DEVICE, TEMPERATURE, Setting, build_policy, relative_error
from torch import Tensor

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy.log_probs import token_log_probs

Errors = dict[str, float]
# The largest error allowed. bf16 keeps 8 bits of the numbers stored in it: gradients of hidden states and output
# weights, attention's probabilities, a decoder's activations.
BOUNDS = {
    **dict.fromkeys(("log_probs", "entropies"), 1e-2),
    **dict.fromkeys(("hidden_gradient", "weight_gradient"), 2e-2),
    **dict.fromkeys(("output", "q_gradient", "k_gradient", "v_gradient"), 2e-2),
    "sampled_log_probs": 5e-2,
}


def run(setting: Setting, path: Path) -> dict[str, dict[str, Any]]:
    """For each `section.variant`: its errors, the largest multiple of a bound among them, and whether it is `right`.

    A variant that raised has the error's text instead, and is not right. path: a model for `decode`.
    """
    results: dict[str, dict[str, Any]] = {}
    for section, prepare in (
        ("log_probs", _prepare_head),
        ("attention", _prepare_attention),
        ("decode", _prepare_decode),
    ):
        variants, measure = prepare(setting, path)
        for name, variant in variants.items():
            results[f"{section}.{name}"] = _check(variant, measure)
    return results


def list_default_variants() -> list[str]:
    """`section.variant` of the first variant of each section, which is the default on a GPU."""
    sections = {
        "log_probs": heads.make_variants(),
        "attention": attention_variants.make_variants(),
        "decode": decoding.VARIANTS,
    }
    return [f"{section}.{next(iter(variants))}" for section, variants in sections.items()]


def _check(variant: AbstractContextManager[None], measure: Callable[[], Errors]) -> dict[str, Any]:
    """The errors that `measure` returns under a variant, compared with their bounds."""
    try:
        with variant:
            errors = measure()
    except Exception as error:  # a failure is this variant's result; the others are still measured
        return {"error": f"{type(error).__name__}: {error}"[:1000], "right": False}
    right = all(value <= BOUNDS[name] for name, value in errors.items())  # false for a NaN
    return errors | {"times_bound": max(value / BOUNDS[name] for name, value in errors.items()), "right": right}


# --- the sections: each function returns its variants, and a function that measures the errors of the present one ---

Variants = Mapping[str, AbstractContextManager[None]]


def _prepare_head(setting: Setting, _: Path) -> tuple[Variants, Callable[[], Errors]]:
    """Log-probs and entropies of random hidden states, and the gradients of hidden states and weight."""
    n, v, h = setting.size(5000, 600), setting.size(9000, 1100), setting.head_sizes()[2]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    hidden, weight = draw(n, h).bfloat16().requires_grad_(), (draw(v, h) * 3 / h**0.5).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), generator=generator, device=DEVICE)
    grads = draw(n), draw(n)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    log_p = (exact[0] @ exact[1].T / TEMPERATURE).log_softmax(-1)
    expected = [log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]
    torch.autograd.backward(expected, [g.double() for g in grads])
    expected = [x.detach() for x in expected] + [x.grad for x in exact if x.grad is not None]
    del log_p

    def measure() -> Errors:
        hidden.grad = weight.grad = None
        values, entropies = token_log_probs(hidden, weight, targets, temperature=TEMPERATURE, entropies=True)
        assert entropies is not None
        torch.autograd.backward([values, entropies], list(grads))
        return _relative_errors(
            ("log_probs", "entropies", "hidden_gradient", "weight_gradient"),
            [values, entropies, hidden.grad, weight.grad],
            expected,
        )

    return heads.make_variants(), measure


def _prepare_attention(setting: Setting, _: Path) -> tuple[Variants, Callable[[], Errors]]:
    """Attention over five packed sequences, and the gradients of q, k and v."""
    lengths = [setting.size(n, max(n // 50, 1)) for n in (701, 2111, 1, 333, 350)]
    core, packed, qkv, grad = attention_variants.make_inputs(setting.shape("1p5b"), lengths)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    references = [
        attention_variants.compute_reference(qkv, grad, slice(end - length, end), torch.float64)
        for end, length in zip(ends, lengths, strict=True)
    ]
    expected = [torch.cat(tensors) for tensors in zip(*references, strict=True)]

    def measure() -> Errors:
        for x in qkv:
            x.grad = None
        out = core(*qkv, packed_seq_params=packed)
        out.backward(grad)
        actual = [out[:, 0], *(x.grad[:, 0].flatten(1) for x in qkv if x.grad is not None)]
        return _relative_errors(("output", "q_gradient", "k_gradient", "v_gradient"), actual, expected)

    return attention_variants.make_variants(), measure


def _prepare_decode(setting: Setting, path: Path) -> tuple[Variants, Callable[[], Errors]]:
    """The engine's log-probs of the tokens that it sampled; transformers in float64 has the expected ones.

    Prompts have several lengths, and one in 32 tokens ends a response, so that rows end at different steps.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").to(DEVICE)
    vocabulary = model.config.vocab_size
    prompts = [[3 + (5 * i + j) % (vocabulary - 3) for j in range(3 + i % 5)] for i in range(8) for _ in range(2)]
    policy = build_policy(path, setting.size(4096, 200), with_optimizer=False)
    engine = MegatronEngine(policy, range(vocabulary // 32))
    sampling = SamplingParams(TEMPERATURE, setting.size(80, 40))

    def measure() -> Errors:
        responses = engine.generate(prompts, range(len(prompts)), sampling)
        expected = [_response_log_probs(model, p, r.tokens.tolist()) for p, r in zip(prompts, responses, strict=True)]
        actual = torch.cat([torch.from_numpy(r.log_probs) for r in responses])
        return {"sampled_log_probs": relative_error(actual, torch.cat(expected))}

    return decoding.make_variants(engine), measure


@torch.no_grad()
def _response_log_probs(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Log-probs [length] of a response's tokens by a transformers model."""
    ids = torch.tensor([prompt + response], device=DEVICE)
    log_p = (model(ids).logits[0, len(prompt) - 1 : -1].double() / TEMPERATURE).log_softmax(-1)
    return log_p.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


def _relative_errors(names: tuple[str, ...], actual: list[Any], expected: list[Tensor]) -> Errors:
    return {name: relative_error(a, e) for name, a, e in zip(names, actual, expected, strict=True)}
