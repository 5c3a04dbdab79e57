"""The programs imdb-train, imdb-evaluate and imdb-predict, each a module to run with `python -m`.

It may import every other folder, but at the top of a module only what needs no torch, so that `--help` is instant.
"""
