"""Descriptions of models as data: architectures, and the config, sizes, weights and files of a Hugging Face directory.

Read by the policy, the engines, conversion and the estimates. Must not import megatron-core or build a network.
"""
