"""The Triton implementation: device code, the kernels with their launchers, and the operators that autograd sees.

It may import `_arguments` and `_checks` beside this folder. The entry points import it where they call it, so that a CPU
needs no Triton; `testing` imports its model of the schedule.
"""
