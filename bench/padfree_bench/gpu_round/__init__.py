"""`python -m bench gpu-round`: a GPU's quarter of an hour, in two parts; the kernels' proof and all tables.

`driver` runs the steps of `steps`, each a process of its own: a suite, or a module of this folder by `__main__`.
It may import every folder of the benchmark; only the command line imports it.
"""
