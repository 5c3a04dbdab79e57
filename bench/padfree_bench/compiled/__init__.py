"""Kernels compiled ahead of time: their resources, their instructions, and what a cost model predicts of them.

It may import `measuring`; tuning, suites and gpu_round may import it.
"""
