"""Conversion of checkpoints between formats, tensor by tensor, without a network, a process group or a GPU.

Used by tools/convert/; reads and writes files alone. Unpickles only torch_dist's metadata, and only listed classes.
"""
