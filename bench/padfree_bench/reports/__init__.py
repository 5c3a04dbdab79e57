"""What the result files say: pictures, one HTML page, README's table, and the comparison of two runs.

It may import padfree_bench.measuring only; suites and the command line may import it.
"""
