"""Checkpoint converters: Hugging Face <-> Megatron <-> NeMo. tools/convert/ is installed as nemo_disco.convert.

Each file is a script with a main(); the work is in nemo_disco/conversion/. Nothing in nemo_disco imports from here.
"""
