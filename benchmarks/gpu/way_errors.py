"""The error of each way that the sections log_probs, attention and decode time, against float64: whether it is right.

A way may have been written without ever having run (Triton's kernels, addmm with out_dtype, cuDNN's attention, CUDA
graphs have none on a CPU); sizes are small, and such that every way has several tiles, sequences or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attention_ways
import decoding
import heads
import torch
from setting import DEVICE, TEMPERATURE, Setting, build_policy, relative_error
from torch import Tensor

from nemo_disco.generation.engine import SamplingParams
from nemo_disco.generation.megatron.engine import MegatronEngine
from nemo_disco.policy.log_probs import token_log_probs

Errors = dict[str, float]
# bf16 keeps 8 bits of what is stored in it: the head's gradients, attention's probabilities, a decoder's activations.
BOUNDS = {
    **dict.fromkeys(("log_probs", "entropies"), 1e-2),
    **dict.fromkeys(("hidden_gradient", "weight_gradient"), 2e-2),
    **dict.fromkeys(("output", "q_gradient", "k_gradient", "v_gradient"), 2e-2),
    "sampled_log_probs": 5e-2,
}


def run(setting: Setting, path: Path) -> dict[str, dict[str, Any]]:
    """By `section.way`: its errors, the worst of them over its bound, and `right`; or the error that it raised."""
    checked: dict[str, dict[str, Any]] = {}
    for section, measure in (("log_probs", _head), ("attention", _attention), ("decode", _decoding)):
        ways, errors = measure(setting, path)
        for name, way in ways.items():
            checked[f"{section}.{name}"] = _judge(way, errors)
    return checked


def default_ways() -> list[str]:
    """Those that the product takes on this device."""
    first = {"log_probs": heads.ways(), "attention": attention_ways.ways(), "decode": decoding.WAYS}
    return [f"{section}.{next(iter(ways))}" for section, ways in first.items()]


def _judge(way: AbstractContextManager[None], errors: Callable[[], Errors]) -> dict[str, Any]:
    try:
        with way:
            found = errors()
    except Exception as error:  # one way that fails is a result, and stops no other
        return {"error": f"{type(error).__name__}: {error}"[:1000], "right": False}
    right = all(value <= BOUNDS[name] for name, value in found.items())  # not so for a NaN
    return found | {"times_bound": max(value / BOUNDS[name] for name, value in found.items()), "right": right}


Ways = Mapping[str, AbstractContextManager[None]]


def _head(setting: Setting, _: Path) -> tuple[Ways, Callable[[], Errors]]:
    n, v, h = setting.size(5000, 600), setting.size(9000, 1100), setting.head()[2]
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

    def errors() -> Errors:
        hidden.grad = weight.grad = None
        values, entropies = token_log_probs(hidden, weight, targets, temperature=TEMPERATURE, entropies=True)
        assert entropies is not None
        torch.autograd.backward([values, entropies], list(grads))
        return _relative_errors(
            ("log_probs", "entropies", "hidden_gradient", "weight_gradient"),
            [values, entropies, hidden.grad, weight.grad],
            expected,
        )

    return heads.ways(), errors


def _attention(setting: Setting, _: Path) -> tuple[Ways, Callable[[], Errors]]:
    lengths = [setting.size(n, max(n // 50, 1)) for n in (701, 2111, 1, 333, 350)]
    core, packed, qkv, grad = attention_ways.inputs(setting.shape("1p5b"), lengths)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    pieces = [
        attention_ways.reference(qkv, grad, slice(end - length, end), torch.float64)
        for end, length in zip(ends, lengths, strict=True)
    ]
    expected = [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def errors() -> Errors:
        for x in qkv:
            x.grad = None
        out = core(*qkv, packed_seq_params=packed)
        out.backward(grad)
        found = [out[:, 0], *(x.grad[:, 0].flatten(1) for x in qkv if x.grad is not None)]
        return _relative_errors(("output", "q_gradient", "k_gradient", "v_gradient"), found, expected)

    return attention_ways.ways(), errors


def _decoding(setting: Setting, path: Path) -> tuple[Ways, Callable[[], Errors]]:
    """The engine's log-probs of the tokens that it drew, against transformers' float64. Prompts are of several lengths,
    and rows end early, so that the others go on without them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").to(DEVICE)
    vocabulary = model.config.vocab_size
    prompts = [[3 + (5 * i + j) % (vocabulary - 3) for j in range(3 + i % 5)] for i in range(8) for _ in range(2)]
    policy = build_policy(path, setting.size(4096, 200), with_optimizer=False)
    engine = MegatronEngine(policy, range(vocabulary // 32))
    sampling = SamplingParams(TEMPERATURE, setting.size(80, 40))

    def errors() -> Errors:
        responses = engine.generate(prompts, range(len(prompts)), sampling)
        expected = [_sampled(model, p, r.tokens.tolist()) for p, r in zip(prompts, responses, strict=True)]
        found = torch.cat([torch.from_numpy(r.log_probs) for r in responses])
        return {"sampled_log_probs": relative_error(found, torch.cat(expected))}

    return decoding.ways(engine), errors


@torch.no_grad()
def _sampled(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    ids = torch.tensor([prompt + response], device=DEVICE)
    log_p = (model(ids).logits[0, len(prompt) - 1 : -1].double() / TEMPERATURE).log_softmax(-1)
    return log_p.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


def _relative_errors(names: tuple[str, ...], actual: list[Any], expected: list[Tensor]) -> Errors:
    return {name: relative_error(f, e) for name, f, e in zip(names, actual, expected, strict=True)}
