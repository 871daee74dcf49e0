"""A fake of the part of TensorRT-LLM's API that the worker uses, with the signatures of NVIDIA/TensorRT-LLM's source.

LLM and _collective_rpc: tensorrt_llm/llmapi/llm.py; the extension: tensorrt_llm/llmapi/rlhf_utils.py at 04762f3;
sleep and wakeup by tags: tensorrt_llm/_torch/async_llm.py at 0acd798; SamplingParams: tensorrt_llm/sampling_params.py
at 000a01d, to which 1.2 added logprobs_mode. Sleep is allowed by enable_sleep in 1.2 and by sleep_config in 1.3.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
from torch import Tensor

COMMON = ("orchestrator_type", "ray_worker_extension_cls", "backend", "load_format", "max_seq_len", "kv_cache_config")
# The keyword arguments of LLM in each version.
VERSIONS = {"1.1.0": (), "1.2.0": (*COMMON, "enable_sleep"), "1.3.0rc1": (*COMMON, "sleep_config", "quant_config")}


@dataclasses.dataclass
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    logprobs: int | None = None
    logprobs_mode: str = "raw"
    ignore_eos: bool = False
    detokenize: bool = True
    embedding_bias: Tensor | None = None

    @property
    def greedy(self) -> bool:  # SamplingParams._greedy_decoding
        return (self.top_k is None or self.top_k == 1) and (self.top_p is None or self.top_p == 0.0)


@dataclasses.dataclass
class OldSamplingParams:
    max_tokens: int = 32
    logprobs: int | None = None


@dataclasses.dataclass
class KvCacheConfig:
    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float | None = None


class WorkerExtension:
    """One rank's weights, with the methods update_weights, sleep and wakeup."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.open, self.asleep, self.prefix_cache = False, False, False

    def update_weights(self, ipc_handles: dict[str, Any] | None = None) -> None:
        if ipc_handles is None:
            assert self.open
            self.open = self.prefix_cache = False
            return
        self.open = True
        for name, (func, args) in ipc_handles["GPU-0"]:
            list_args = list(args)
            list_args[6] = 0
            self.weights[name] = func(*list_args).clone()

    def sleep(self, tags: list[str]) -> None:
        assert set(tags) == {"model", "kv_cache"}
        self.asleep = True
        self.weights.clear()

    def wakeup(self, tags: list[str]) -> None:
        assert set(tags) == {"model", "kv_cache"}
        self.asleep = False


class RequestOutput:
    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs

    def __await__(self) -> Any:
        async def get_output() -> RequestOutput:
            return self

        return get_output().__await__()


class LLM:
    last: LLM  # the LLM that was built last

    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        assert (tokenizer, tokenizer_mode, revision, tokenizer_revision) == (None, "auto", None, None)
        assert skip_tokenizer_init and not trust_remote_code and tensor_parallel_size == 1 and dtype == "bfloat16"
        names = VERSIONS[sys.modules["tensorrt_llm"].__version__]
        assert set(kwargs) <= set(names), f"this version of LLM has no arguments {set(kwargs) - set(names)}"
        assert kwargs["orchestrator_type"] == "ray" and kwargs["load_format"] == "dummy"
        self.model, self.kwargs, self.rank, self.requests = model, kwargs, WorkerExtension(), []
        LLM.last = self

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestOutput:
        assert sampling_params is not None and not streaming and not self.rank.asleep and not self.rank.open
        self.requests.append(sampling_params)
        tokens = [*inputs, sampling_params.stop_token_ids[0]]
        log_probs = [{token: types.SimpleNamespace(logprob=-0.25, rank=1)} for token in tokens]
        output = types.SimpleNamespace(token_ids=tokens, logprobs=log_probs, finish_reason="stop")
        return RequestOutput([output])

    def _collective_rpc(
        self,
        method: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        target_ranks: int | list[int] | None = None,
    ) -> list[Any]:
        assert (kwargs, non_block, unique_reply_rank, target_ranks) == (None, False, None, None)
        return [getattr(self.rank, method)(*args)]


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Make `import tensorrt_llm` import this fake, as the given version."""
    fields = dict.fromkeys(VERSIONS[version])
    llm_args = types.ModuleType("tensorrt_llm.llmapi.llm_args")
    llm_args.TorchLlmArgs = types.SimpleNamespace(model_fields=fields)
    llm_args.SleepConfig = dict
    llmapi = types.ModuleType("tensorrt_llm.llmapi")
    llmapi.KvCacheConfig, llmapi.llm_args, llmapi.QuantConfig = KvCacheConfig, llm_args, dict
    top = types.ModuleType("tensorrt_llm")
    top.LLM, top.llmapi, top.__version__ = LLM, llmapi, version
    top.SamplingParams = OldSamplingParams if version == "1.1.0" else SamplingParams
    for module in (top, llmapi, llm_args):
        monkeypatch.setitem(sys.modules, module.__name__, module)
