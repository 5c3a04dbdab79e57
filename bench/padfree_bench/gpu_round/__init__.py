"""`python -m bench gpu-round`: all that a GPU is asked, in two parts that fit a quarter of an hour.

It may import every folder of the benchmark, and nothing imports it but the command line. `driver` runs the steps of
`steps`, each a process of its own: a suite, or a module of this folder by `__main__`.
"""
