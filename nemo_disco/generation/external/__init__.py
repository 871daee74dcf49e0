"""The trainer's side of vllm and tensorrt_llm: starts their processes, refits them and receives their responses."""
