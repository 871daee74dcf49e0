"""The worker's engine on TensorRT-LLM 1.2 and 1.3. Not run: written to the published API, tested with a fake.

The names are those of NVIDIA/TensorRT-LLM: tensorrt_llm/llmapi/rlhf_utils.py at 04762f3 (WorkerExtension),
_torch/async_llm.py at 0acd798 (sleep, wakeup), sampling_params.py at 000a01d (SamplingParams).
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .cuda import Broadcast, IpcMemory
from .tensors import Assembly
from .wire import RefusedError, product

EXTENSION = "tensorrt_llm.llmapi.rlhf_utils.WorkerExtension"
MEMORY = ["model", "kv_cache"]  # TensorRT-LLM's tags of the memory that `sleep` frees
_HEARTBEAT_S = 2.0


class WorkerEngine:
    """An LLM whose ranks are Ray actors of a private, local Ray that ends with this process."""

    gpu = True

    def __init__(self, settings: dict[str, Any]) -> None:
        import tensorrt_llm
        from tensorrt_llm import LLM, SamplingParams
        from tensorrt_llm.llmapi import KvCacheConfig, llm_args

        version = tensorrt_llm.__version__
        self.sampling_params, self.stop = SamplingParams, settings["stop_token_ids"]
        # Names changed between 1.2 and 1.3: look them up in the installed version.
        parameters = inspect.signature(SamplingParams).parameters
        if "logprobs_mode" not in parameters:
            raise RefusedError(
                f"TensorRT-LLM {version} has no logprobs_mode: its log-probs ignore the temperature; use 1.2 or later"
            )
        self.bias = _bias(settings["vocabulary"], settings["rows"], parameters)
        fields = llm_args.TorchLlmArgs.model_fields
        missing = [name for name in ("orchestrator_type", "ray_worker_extension_cls") if name not in fields]
        if missing:
            raise RefusedError(
                f"TensorRT-LLM {version} has no {' and no '.join(missing)}, so its weights cannot be replaced; "
                "use 1.2 or later"
            )
        arguments: dict[str, Any] = {}
        if settings["sleeps"]:
            if "sleep_config" in fields:
                arguments["sleep_config"] = llm_args.SleepConfig()
            elif "enable_sleep" in fields:
                arguments["enable_sleep"] = True
            else:
                raise RefusedError(
                    f"TensorRT-LLM {version} cannot sleep: set generation.colocated=false, with GPUs of its own"
                )
        if settings["quantization"] is not None:
            from tensorrt_llm.llmapi import QuantConfig

            arguments["quant_config"] = QuantConfig(quant_algo=settings["quantization"].upper())
        self.sleeps = settings["sleeps"]
        os.environ.setdefault("RAY_ADDRESS", "local")  # never a Ray cluster that runs on this machine
        self.engine = LLM(
            model=settings["model"],
            backend="pytorch",
            dtype=settings["dtype"],
            orchestrator_type="ray",
            ray_worker_extension_cls=EXTENSION,
            load_format="dummy",  # the weights come with the first refit
            skip_tokenizer_init=True,
            max_seq_len=settings["max_length"],
            tensor_parallel_size=settings["tensor_parallel_size"],
            trust_remote_code=settings["trust_remote_code"],
            kv_cache_config=KvCacheConfig(enable_block_reuse=True),  # a group shares its prompt's keys and values
            **(arguments | settings["options"]),
        )
        self.devices = range(settings["tensor_parallel_size"])

    def open_staging(self, _path: str, shape: tuple[int, int], remote: bool) -> list[dict[str, Any]]:
        """Allocate slots [slots, bytes] in this process (Ray's ranks get copies) and return their description."""
        self.broadcast: Broadcast | None = None
        if remote:
            self.slots = torch.empty(shape, dtype=torch.uint8, device="cuda:0")
            return [{}]
        memory = IpcMemory.allocate(product(shape), device=0)
        self.slots = memory.tensor.view(*shape)
        return [memory.describe()]

    def join(self, unique_id: bytes, size: int) -> None:
        """Join the run's NCCL communicator."""
        self.broadcast = Broadcast(unique_id, 1, size, self.slots.device)

    def receive(self, slot: int) -> None:
        """Receive the run's broadcast of a slot, if the run is on another machine."""
        if self.broadcast is not None:
            self.broadcast(self.slots[slot])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: dict[str, Any],
        deliver: Callable[[int, Sequence[int], Sequence[float], str], None],
        heartbeat: Callable[[], None],
    ) -> None:
        """Sample a response to each prompt; calls deliver(index, tokens, log-probs, finish reason) for each."""

        async def generate_one(index: int) -> None:
            output = await self.engine.generate_async(list(prompts[index]), self._parameters(sampling, seeds[index]))
            c = output.outputs[0]
            log_probs = [step[token].logprob for step, token in zip(c.logprobs, c.token_ids, strict=True)]
            deliver(index, c.token_ids, log_probs, c.finish_reason)

        async def generate_all() -> None:
            waiting = {asyncio.ensure_future(generate_one(i)) for i in range(len(prompts))}
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=_HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                heartbeat()

        asyncio.run(generate_all())

    def _parameters(self, sampling: dict[str, Any], seed: int) -> Any:
        greedy = sampling["temperature"] == 0.0
        return self.sampling_params(
            max_tokens=sampling["max_tokens"],
            temperature=1.0 if greedy else sampling["temperature"],
            # Both None would silently decode greedily.
            top_k=1 if greedy else sampling["top_k"],
            top_p=None if greedy else sampling["top_p"],
            seed=seed,
            end_id=-1,  # only stop_token_ids end a response
            pad_id=0,
            stop_token_ids=self.stop,
            include_stop_str_in_output=True,  # without it the stop token is cut off
            logprobs=1,
            logprobs_mode="processed",  # of logits / temperature; raw ones ignore the temperature
            detokenize=False,
            **self.bias,
        )

    def begin_refit(self) -> None:
        """Begin a refit; TensorRT-LLM's extension begins at the first bucket."""
        self.assembly = Assembly()

    def load_bucket(self, slot: int, pieces: list[Any]) -> dict[str, str]:
        """Load the tensors that a slot's pieces complete; returns their checksums by name."""
        complete = list(self.assembly.take(self.slots[slot], pieces))
        handles = self.share([(name, tensor) for name, tensor, _ in complete])
        self.engine._collective_rpc("update_weights", args=(handles,))
        return {name: checksum for name, _, checksum in complete}

    def share(self, weights: list[tuple[str, Tensor]]) -> dict[str, list[Any]]:
        """Share the weights in the extension's form: by GPU, names and torch's handles of shared tensors."""
        from tensorrt_llm._torch.utils import get_device_uuid
        from torch.multiprocessing.reductions import reduce_tensor

        handle: Callable[[Any], Any] = reduce_tensor
        # In memory of torch's allocator, the only kind that torch can share; kept until the next bucket.
        self._copies = {i: [(name, t.to(f"cuda:{i}")) for name, t in weights] for i in self.devices}
        torch.cuda.synchronize()
        return {get_device_uuid(i): [(name, handle(t)) for name, t in self._copies[i]] for i in self.devices}

    def finish_refit(self) -> None:
        self.engine._collective_rpc("update_weights", args=(None,))  # also drops the prefix cache

    def abort_refit(self) -> None:
        """Do nothing: the weights stay mixed until a full refit has replaced them all."""

    def sleep(self) -> bool:
        """Free weights and cache if the engine can sleep; True if it can."""
        if self.sleeps:
            self.engine._collective_rpc("sleep", args=(MEMORY,))
        return bool(self.sleeps)

    def wake(self) -> None:
        if self.sleeps:
            self.engine._collective_rpc("wakeup", args=(MEMORY,))


def _bias(vocabulary: int, rows: int, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arguments of SamplingParams that keep the vocabulary's padding rows out of samples and log-probs."""
    if vocabulary == rows:
        return {}
    if "embedding_bias" not in parameters:
        raise RefusedError(
            f"the model has {rows} rows for {vocabulary} tokens, and this TensorRT-LLM has no embedding_bias to hide "
            "the others; take another version"
        )
    bias = torch.zeros(rows)
    bias[vocabulary:] = float("-inf")
    return {"embedding_bias": bias}
