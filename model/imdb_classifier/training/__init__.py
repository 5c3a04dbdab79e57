"""The training run: its processes, objects, guards, saves, reports and loop; and inference, which it shares.

It may import checkpoints, data, and the modules beside this folder; only commands import it, and the package's own
`__init__`, which offers `Classifier`.
"""
