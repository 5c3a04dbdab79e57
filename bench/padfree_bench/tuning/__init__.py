"""`python -m bench tune`: candidates for rows of the kernels' configuration table, chosen on a CPU, timed on a GPU.

It may import `measuring`, `peers` and `compiled`, and is imported by `suites` (for accepted rows) and `gpu_round`.
"""
