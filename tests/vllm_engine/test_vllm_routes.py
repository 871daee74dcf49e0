"""The experts that vLLM chose, replayed by the trainer (model.moe_router_replay=engine).

vLLM's CPU build returns none of its own: these are those of rollout_worker/vllm_routes.py. GPUs take vLLM's (not run).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_vllm_run import start as start_command
from test_vllm_run import steps, wait_for_success
from tiny_models import model_config, save_family, to_rollouts
from vllm_process import SHAPE, start_vllm

from nemo_disco.commands.quickstart import model_directory
from nemo_disco.generation.engine import SamplingParams
from nemo_disco.policy import parallel
from nemo_disco.policy.policy import Policy

pytestmark = pytest.mark.vllm
