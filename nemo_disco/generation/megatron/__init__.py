"""The engine `megatron`: decodes with the policy's own weights, in the trainer's processes."""
