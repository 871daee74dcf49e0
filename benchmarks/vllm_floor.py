"""Time vLLM's own reload of weights that are already in its process: the lower bound of a refit into vLLM.

refit.py runs this with the Python that has vLLM and with the worker's directory on PYTHONPATH. It reads the engine's
settings and the number of repeats as JSON from standard input, and prints the seconds of every repeat as JSON in the
last line.
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
    engine = adapter.WorkerEngine(settings).engine
    weights = load_file(os.path.join(settings["model"], "model.safetensors"))
    weights = {name: tensor.clone() for name, tensor in weights.items()}  # out of the mapped file, into memory

    def reload(worker: Any) -> None:
        from vllm.config import set_current_vllm_config

        adapter._vllm_begin(worker)
        with set_current_vllm_config(worker.vllm_config):
            worker.get_model().load_weights(weights.items())
        adapter._vllm_finish(worker)

    seconds = []
    for _ in range(1 + settings["repeats"]):
        began = time.perf_counter()
        engine.collective_rpc(reload)
        seconds.append(time.perf_counter() - began)
    print(f"\n{json.dumps(seconds[1:])}", flush=True)  # without the first, which warms up
    os._exit(0)  # at once, without waiting for vLLM's threads


if __name__ == "__main__":
    main()
