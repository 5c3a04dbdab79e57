"""How anything is measured: workloads and inputs, the truth they are checked against, timing, and result files.

Every other folder of padfree_bench may import it; it imports none of them.
"""
