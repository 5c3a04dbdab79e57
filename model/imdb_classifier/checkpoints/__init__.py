"""What a run leaves on the disk: whole and verified checkpoints, their tensors, and the folder that holds them.

It may import data (for the tokenizer) and the modules beside this folder.
"""
