"""vLLM's own reload of tensors that are in its process already: what no refit of it can beat.

Run by the interpreter that has vLLM, with the worker's directory on PYTHONPATH; settings as JSON on standard input, the
seconds of every turn as JSON on the last line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from rollout_worker import vllm as adapter
from safetensors.torch import load_file


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    engine = adapter.Vllm(settings).engine
    weights = load_file(os.path.join(settings["model"], "model.safetensors"))
    weights = {name: tensor.clone() for name, tensor in weights.items()}  # off the file's mapping

    def reload(worker: Any) -> None:
        from vllm.config import set_current_vllm_config

        adapter._vllm_begin(worker)
        with set_current_vllm_config(worker.vllm_config):
            worker.get_model().load_weights(weights.items())
        adapter._vllm_finish(worker)

    turns = []
    for _ in range(1 + settings["repeats"]):
        began = time.perf_counter()
        engine.collective_rpc(reload)
        turns.append(time.perf_counter() - began)
    print(f"\n{json.dumps(turns[1:])}", flush=True)
    os._exit(0)  # vLLM's own threads do not hold this process up


if __name__ == "__main__":
    main()
