"""What a model is, as data read from its Hugging Face directory: sizes, modules, rope, tensor names and files.

Read by the policy, the engines, conversion and the estimates. Must not import megatron-core or build a network.
"""
