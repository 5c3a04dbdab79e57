"""How anything is measured: workloads and inputs, the truth they are checked against, timing, and result files.

Everything else in padfree_bench may import it; it imports padfree and no other folder of padfree_bench.
"""
