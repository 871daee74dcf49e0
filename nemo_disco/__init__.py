"""DisCO post-training of reasoning models on Megatron-Core.

Importing this package costs nothing: torch, megatron-core and transformers are imported by the rooms that use them.
"""

__version__ = "0.1.0"
