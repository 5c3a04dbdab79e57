"""The suites of `python -m bench`: each module is a workload and those who compete on it, `run` is its entry point.

`session` holds a run's options, progress and result file, `contenders` the frame of every contest: row, check, clock.
May import every folder of padfree_bench but `gpu_round`; imported by the command line and by `gpu_round` only.
"""
