"""The experts that vLLM chooses for each token, recorded in its ranks on a CPU (model.moe_router_replay=engine).

On GPUs vLLM returns them itself (enable_return_routed_experts). Its CPU build does not: only model runner V2 returns
them, and that needs triton-cpu, which PyPI does not have (vllm 0.32: config/vllm.py, lines 1144 and 3189). So the
routers' own hook for it (BaseRouter.set_capture_fn) is used with model runner V1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .wire import RefusedError


class RouteRecorder:
    """Records the experts of each token of each request. It sees the tokens that go through the model: the engine must
    have no prefix cache, so that all do."""

    def __init__(self, worker: Any) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self.runner, model = worker.model_runner, worker.get_model()
        routers = {m.layer_id: m.router for m in model.modules() if isinstance(m, MoERunner)}
        if not routers or set(routers) != set(range(len(routers))):
            raise RefusedError(
                f"model.moe_router_replay=engine: vLLM has routers in layers {sorted(routers)}, not in all"
            )
        self.dtype = torch.uint8 if routers[0].global_num_experts <= 256 else torch.int16
        self.chosen: list[Tensor] = [torch.empty(0)] * len(routers)  # of the present pass: [tokens, K] of each layer
        self.by_request: dict[str, list[Tensor]] = {}  # [tokens, layers, K] of one pass after another
        for layer, router in routers.items():
            router.set_capture_fn(partial(self._capture, layer))
        model.register_forward_hook(self._store, with_kwargs=True)

    def _capture(self, layer: int, chosen: Tensor) -> None:
        self.chosen[layer] = chosen.to(self.dtype)

    def _store(self, _model: Any, _inputs: Any, options: dict[str, Any], _output: Any) -> None:
        """Divide the tokens of the pass among the requests of the batch."""
        ends, chosen = self.runner.query_start_loc.np, torch.stack(self.chosen, 1)
        for i, request in enumerate(self.runner.input_batch.req_ids):
            start, end = int(ends[i]), int(ends[i + 1])
            parts = self.by_request.setdefault(request, [])
            # A preempted request begins anew. As in vLLM its first experts stay, which sampled the tokens so far.
            known = max(0, sum(map(len, parts)) - int(options["positions"][start]))
            if start + known < end:
                parts.append(chosen[start + known : end].clone())

    def take(self, request: str, tokens: int) -> Any:
        """A finished request's array [tokens, layers, K], which is then forgotten. tokens: all but the last."""
        routes = torch.cat(self.by_request.pop(request))
        if len(routes) < tokens:
            raise RefusedError(
                f"model.moe_router_replay=engine: vLLM skipped {tokens - len(routes)} of {tokens} tokens of a "
                "response; leave out generation.options.enable_prefix_caching"
            )
        return routes[:tokens].numpy()
