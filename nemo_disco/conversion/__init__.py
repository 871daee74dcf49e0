"""Checkpoints from one form to another, tensor by tensor: no model is built, no process group, no GPU.

Used by tools/convert/; touches files alone. Nothing is unpickled but the metadata of torch_dist, by a list of classes.
"""
