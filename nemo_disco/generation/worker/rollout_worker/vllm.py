"""The worker's engine on vLLM 0.32: streams responses, and refits by vLLM's layer-wise reload.

A comment explains each default of vLLM that is changed because it would be silently wrong here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cuda import Broadcast, IpcMemory
from .tensors import Assembly
from .vllm_routes import RouteRecorder
from .wire import RefusedError, map_staging, product

_CPU_CACHE_BYTES = 2 << 30
_CPU_BATCH_TOKENS = 4096
_COLOCATED_SHARE = 0.5
_LOAD_BYTES = 32 << 20  # loaded together: each load goes through all of vLLM's parameters


class WorkerEngine:
    """vLLM's engine in this process; with tensor parallelism it starts a process for each rank."""

    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        # By default each rank on a CPU needs a NUMA node, and one rank takes all cores from the trainer.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        start = time.monotonic()
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        self.import_seconds = time.monotonic() - start
        self.gpu, self.stop = current_platform.is_cuda(), settings["stop_token_ids"]
        self.joined, self.records_routes = False, settings["routes"] and not self.gpu
        arguments = {
            "enforce_eager": not self.gpu,
            "enable_sleep_mode": self.gpu and settings["sleeps"],
            "quantization": settings["quantization"],
            "max_model_len": settings["max_length"],
            "tensor_parallel_size": settings["tensor_parallel_size"],
            "trust_remote_code": settings["trust_remote_code"],
            "enable_return_routed_experts": self.gpu and settings["routes"],
        }
        # vLLM's default is nine tenths of the memory, which the trainer needs too.
        if not self.gpu:
            arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
            # A prompt in two chunks rewinds the random generator of its seed, which is impossible on a CPU.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(_CPU_BATCH_TOKENS, settings["max_length"])
            if settings["routes"]:
                arguments["enable_prefix_caching"] = False
        elif settings["sleeps"]:
            arguments["gpu_memory_utilization"] = _COLOCATED_SHARE
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings["model"],
                dtype=settings["dtype"],
                load_format="dummy",  # the weights come with the first refit
                skip_tokenizer_init=True,
                generation_config="vllm",  # the model's own would silently change top-k and top-p
                logprobs_mode="processed_logprobs",  # of logits / temperature; raw ones ignore the temperature
                disable_log_stats=True,
                **(arguments | settings["options"]),
            )
        )
        self.engine.collective_rpc(_vllm_hide_rows, args=(settings["vocabulary"],))
        if self.records_routes:
            self.engine.collective_rpc(_vllm_record_routes)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: dict[str, Any],
        deliver: Callable[..., None],
        heartbeat: Callable[[], None],
    ) -> None:
        """Sample a response to each prompt; calls deliver(index, tokens, log-probs, finish reason, routes) for each."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.records_routes:
            self.engine.collective_rpc(_vllm_forget_routes)
        ids = [
            self.engine.add_request(
                str(i),
                {"prompt_token_ids": list(prompt)},
                SamplingParams(
                    **sampling,
                    seed=seed,
                    stop_token_ids=self.stop,
                    ignore_eos=True,  # only stop_token_ids end a response
                    logprobs=0,  # only the sampled token's
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        try:
            while self.engine.has_unfinished_requests():
                for out in self.engine.step():
                    c = out.outputs[0]
                    log_probs = [step[token].logprob for step, token in zip(c.logprobs, c.token_ids, strict=True)]
                    index, routes = int(out.request_id), c.routed_experts
                    if self.records_routes:
                        tokens = len(prompts[index]) + len(c.token_ids) - 1
                        routes = self.engine.collective_rpc(_vllm_take_routes, args=(ids[index], tokens))[0]
                    deliver(index, c.token_ids, log_probs, c.finish_reason, routes)
                heartbeat()
        except BaseException:
            self.engine.abort_request(ids, internal=True)
            raise

    def open_staging(self, path: str, shape: tuple[int, int], remote: bool) -> list[dict[str, Any]]:
        """Open slots [slots, bytes] on each rank and return their descriptions. path: of shared memory, on a CPU."""
        ranks: list[dict[str, Any]] = self.engine.collective_rpc(_vllm_open, args=(path, shape, remote))
        return ranks

    def join(self, unique_id: bytes, size: int) -> None:
        """Join the run's NCCL communicator. Not run: it needs GPUs."""
        self.engine.collective_rpc(_vllm_join, args=(unique_id, size))
        self.joined = True

    def receive(self, slot: int) -> None:
        """Receive the run's broadcast of a slot, if the run is on another machine."""
        if self.joined:
            self.engine.collective_rpc(_vllm_receive, args=(slot,))

    def begin_refit(self) -> None:
        self.engine.collective_rpc(_vllm_begin)

    def load_bucket(self, slot: int, pieces: list[Any]) -> dict[str, str]:
        """Load the tensors that a slot's pieces complete; returns their checksums by name."""
        ranks: list[dict[str, str]] = self.engine.collective_rpc(_vllm_load, args=(slot, pieces))
        if any(checksums != ranks[0] for checksums in ranks):
            raise RefusedError("refit: the engine's ranks read different bytes")
        return ranks[0]

    def finish_refit(self) -> None:
        self.engine.collective_rpc(_vllm_load_waiting)
        self.engine.collective_rpc(_vllm_finish)
        if not self.engine.reset_prefix_cache():  # it has keys and values of the old weights
            raise RefusedError("refit: the engine did not drop its prefix cache")

    def abort_refit(self) -> None:
        self.engine.collective_rpc(_vllm_finish)

    def sleep(self) -> bool:
        """Free weights and cache if the engine can sleep; True if it can."""
        if not self.engine.model_config.enable_sleep_mode:
            return False
        self.engine.sleep(level=2)
        return True

    def wake(self) -> None:
        if self.engine.model_config.enable_sleep_mode and self.engine.is_sleeping():
            self.engine.wake_up()


# Each of the following functions runs in every rank of the engine; `worker` is vLLM's.


def _vllm_hide_rows(worker: Any, vocabulary: int) -> None:
    """Set the logits of padding rows (from `vocabulary` on) to -inf, for sampling and log-probs alike.

    A hook does so for the whole batch; `allowed_token_ids` would need a list of the vocabulary for each request."""

    def hide(_layer: Any, _inputs: Any, options: dict[str, Any], logits: torch.Tensor | None) -> None:
        if logits is None:  # a rank that does not sample
            return
        if options.get("skip_gather"):
            raise RefusedError("the engine keeps its logits in shards, where rows without a token cannot be hidden")
        logits[..., vocabulary:] = float("-inf")

    worker.get_model().logits_processor.register_forward_hook(hide, with_kwargs=True)


def _vllm_record_routes(worker: Any) -> None:
    worker.routes = RouteRecorder(worker)


def _vllm_forget_routes(worker: Any) -> None:
    worker.routes.by_request.clear()  # those of a request that failed


def _vllm_take_routes(worker: Any, request: str, tokens: int) -> Any:
    """The routes of a finished request, the same on each rank, of which the first returns them."""
    routes = worker.routes.take(request, tokens)
    return routes if worker.rank == 0 else None


def _vllm_open(worker: Any, path: str, shape: tuple[int, int], remote: bool) -> dict[str, Any]:
    description = {}
    if path:
        memory = map_staging(path, shape)
    elif remote:
        memory = torch.empty(shape, dtype=torch.uint8, device=worker.device)
    else:
        shared = IpcMemory.allocate(product(shape), worker.device.index)
        memory, description = shared.tensor, shared.describe()
    worker.refit_slots = memory.view(*shape)
    return description


def _vllm_join(worker: Any, unique_id: bytes, size: int) -> None:
    worker.refit_broadcast = Broadcast(unique_id, worker.rank + 1, size, worker.device)


def _vllm_receive(worker: Any, slot: int) -> None:
    worker.refit_broadcast(worker.refit_slots[slot])


def _vllm_begin(worker: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    worker.refit_assembly, worker.refit_waiting = Assembly(), []
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(worker.get_model())
    if worker.device.type == "cpu":
        # Experts are packed for the CPU only where their kernel is built (UnquantizedFusedMoEMethod._setup_kernel):
        # with the old kernel, unpacked weights would silently take the place of packed ones.
        for layer in worker.get_model().modules():
            if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
                layer.quant_method.moe_kernel = None


def _vllm_load(worker: Any, slot: int, pieces: list[Any]) -> dict[str, str]:
    memory = worker.refit_slots[slot]
    checksums = {}
    for name, tensor, checksum in worker.refit_assembly.take(memory, pieces):
        worker.refit_waiting.append((name, tensor))
        checksums[name] = checksum
    if sum(tensor.nbytes for _, tensor in worker.refit_waiting) >= _LOAD_BYTES:
        _vllm_load_waiting(worker)
    if memory.is_cuda:
        torch.cuda.synchronize()  # until the slot has been read
    return checksums


def _vllm_load_waiting(worker: Any) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        worker.get_model().load_weights(worker.refit_waiting)  # vLLM keeps them until a layer is complete
    worker.refit_waiting = []


def _vllm_finish(worker: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    model = worker.get_model()
    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(model, worker.vllm_config.model_config)
        head, embeddings = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
        if head is not None and embeddings not in (None, head) and model.config.tie_word_embeddings:
            head.weight = embeddings.weight  # on a CPU the head would silently keep its old packed weights
            head.quant_method.process_weights_after_loading(head)
