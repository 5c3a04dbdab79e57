"""What the compiler makes of the kernels without a GPU: registers, instructions, and a model of their cost.

It may import `measuring` only; `tuning`, `suites`, gpu_round and the command line may import it.
"""
