"""Estimates for a run from its configuration and the model's sizes: memory, time, FLOPs, layouts.

Arithmetic only: nothing is built, sampled or measured here.
"""
