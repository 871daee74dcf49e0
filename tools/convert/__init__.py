"""Checkpoint converters: Hugging Face <-> Megatron <-> NeMo. tools/convert/ here, nemo_disco.convert when installed.

Each is a script with a main(). May use nemo_disco.policy; nothing in nemo_disco imports from here.
"""
