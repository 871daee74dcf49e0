"""vLLM 0.32 behind the worker: generate as a stream, and refit by its layer-wise reload.

What vLLM does silently wrong without help is named where it is helped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cuda import Broadcast, IpcMemory
from .tensors import Assembly
from .wire import RefusedError, map_staging, product

_CPU_CACHE_BYTES = 2 << 30
_CPU_BATCH_TOKENS = 4096
_COLOCATED_SHARE = 0.5
_LOAD_BYTES = 32 << 20  # at each load vLLM looks through all of its parameters


class Vllm:
    """vLLM's engine in this process (with tensor parallelism its ranks are processes of its own)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        # Else a CPU's ranks want a NUMA node each, and one rank takes all cores from the trainer.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        began = time.monotonic()
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        self.import_seconds = time.monotonic() - began
        self.gpu, self.stop = current_platform.is_cuda(), settings["stop_token_ids"]
        self.joined = False
        arguments = {
            "enforce_eager": not self.gpu,
            "enable_sleep_mode": self.gpu and settings["sleeps"],
            "quantization": settings["quantization"],
            "max_model_len": settings["max_length"],
            "tensor_parallel_size": settings["tensor_parallel_size"],
            "trust_remote_code": settings["trust_remote_code"],
        }
        # vLLM's own default is nine tenths of a memory that the trainer needs too.
        if not self.gpu:
            arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
            # A prompt in two chunks rewinds its seed's generator, which a CPU's cannot.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(_CPU_BATCH_TOKENS, settings["max_length"])
        elif settings["sleeps"]:
            arguments["gpu_memory_utilization"] = _COLOCATED_SHARE
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings["model"],
                dtype=settings["dtype"],
                load_format="dummy",  # the first refit brings the weights
                skip_tokenizer_init=True,
                generation_config="vllm",  # the model's own would change top-k and top-p silently
                logprobs_mode="processed_logprobs",  # of logits over the temperature; raw ones ignore it
                disable_log_stats=True,
                **(arguments | settings["options"]),
            )
        )
        self.engine.collective_rpc(_vllm_hide_rows, args=(settings["vocabulary"],))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: dict[str, Any],
        deliver: Callable[[int, Sequence[int], Sequence[float], str], None],
        live: Callable[[], None],
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids = [
            self.engine.add_request(
                str(i),
                {"prompt_token_ids": list(prompt)},
                SamplingParams(
                    **sampling,
                    seed=seed,
                    stop_token_ids=self.stop,
                    ignore_eos=True,  # the stop tokens say it all
                    logprobs=0,  # of the sampled token alone
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
                    deliver(int(out.request_id), c.token_ids, log_probs, c.finish_reason)
                live()
        except BaseException:
            self.engine.abort_request(ids, internal=True)
            raise

    def open_staging(self, path: str, shape: tuple[int, int], remote: bool) -> list[dict[str, Any]]:
        """Slots [slots, bytes] on each rank, as the run needs to know them; path: shared memory, without a GPU."""
        opened: list[dict[str, Any]] = self.engine.collective_rpc(_vllm_open, args=(path, shape, remote))
        return opened

    def join(self, unique_id: bytes, size: int) -> None:
        """Join the run's NCCL communicator. Not run: it needs GPUs."""
        self.engine.collective_rpc(_vllm_join, args=(unique_id, size))
        self.joined = True

    def receive(self, slot: int) -> None:
        """The run's broadcast of a slot."""
        if self.joined:
            self.engine.collective_rpc(_vllm_receive, args=(slot,))

    def begin_refit(self) -> None:
        self.engine.collective_rpc(_vllm_begin)

    def load_bucket(self, slot: int, pieces: list[Any]) -> dict[str, str]:
        ranks: list[dict[str, str]] = self.engine.collective_rpc(_vllm_load, args=(slot, pieces))
        if any(found != ranks[0] for found in ranks):
            raise RefusedError("refit: the engine's ranks read different bytes")
        return ranks[0]

    def finish_refit(self) -> None:
        self.engine.collective_rpc(_vllm_load_waiting)
        self.engine.collective_rpc(_vllm_finish)
        if not self.engine.reset_prefix_cache():  # it holds keys and values of the old weights
            raise RefusedError("refit: the engine did not drop its prefix cache")

    def abort_refit(self) -> None:
        self.engine.collective_rpc(_vllm_finish)

    def sleep(self) -> bool:
        """Whether the weights were given back."""
        if not self.engine.model_config.enable_sleep_mode:
            return False
        self.engine.sleep(level=2)
        return True

    def wake(self) -> None:
        if self.engine.model_config.enable_sleep_mode and self.engine.is_sleeping():
            self.engine.wake_up()


# Each of these runs in every rank of the engine; `worker` is vLLM's.


def _vllm_hide_rows(worker: Any, vocabulary: int) -> None:
    """Rows of the output from `vocabulary` on are no tokens: their logits are -inf for sampling and log-probs alike.
    Once a step for the whole batch; `allowed_token_ids` would cost a list of the vocabulary a request."""

    def hide(_layer: Any, _inputs: Any, options: dict[str, Any], logits: torch.Tensor | None) -> None:
        if logits is None:  # a rank that does not sample
            return
        if options.get("skip_gather"):
            raise RefusedError("the engine keeps its logits in shards, where rows without a token cannot be hidden")
        logits[..., vocabulary:] = float("-inf")

    worker.get_model().logits_processor.register_forward_hook(hide, with_kwargs=True)


def _vllm_open(worker: Any, path: str, shape: tuple[int, int], remote: bool) -> dict[str, Any]:
    described = {}
    if path:
        memory = map_staging(path, shape)
    elif remote:
        memory = torch.empty(shape, dtype=torch.uint8, device=worker.device)
    else:
        shared = IpcMemory.allocate(product(shape), worker.device.index)
        memory, described = shared.tensor, shared.described()
    worker.refit_slots = memory.view(*shape)
    return described


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


def _vllm_load(worker: Any, slot: int, pieces: list[Any]) -> dict[str, str]:
    memory = worker.refit_slots[slot]
    found = {}
    for name, tensor, seen in worker.refit_assembly.take(memory, pieces):
        worker.refit_waiting.append((name, tensor))
        found[name] = seen
    if sum(tensor.nbytes for _, tensor in worker.refit_waiting) >= _LOAD_BYTES:
        _vllm_load_waiting(worker)
    if memory.is_cuda:
        torch.cuda.synchronize()  # the slot has been read
    return found


def _vllm_load_waiting(worker: Any) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        worker.get_model().load_weights(worker.refit_waiting)  # which keeps them until a layer is complete
    worker.refit_waiting = []


def _vllm_finish(worker: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    model = worker.get_model()
    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(model, worker.vllm_config.model_config)
        head, embeddings = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
        if head is not None and embeddings not in (None, head) and model.config.tie_word_embeddings:
            head.weight = embeddings.weight  # on a CPU the head keeps its old packed weights, silently
            head.quant_method.process_weights_after_loading(head)
