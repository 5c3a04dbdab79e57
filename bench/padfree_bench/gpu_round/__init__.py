"""`python -m bench gpu-round`: all that a GPU is asked, in two parts that fit a quarter of an hour.

`steps` says what is done in which order and within which time, `driver` does it and writes what came of it,
`checks` proves the kernels on the hardware, `warm` compiles them beforehand, `prepare` packs what a CPU can make.
"""
