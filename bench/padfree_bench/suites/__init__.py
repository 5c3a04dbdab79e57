"""The suites of `python -m bench`, a module with a `run` each; `session` and `contenders` are what they share.

They may import every folder but gpu_round; only gpu_round and the command line import them.
"""
