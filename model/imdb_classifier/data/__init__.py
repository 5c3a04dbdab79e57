"""Reviews: read from the Hub, files and folders, split, tokenized, and put into batches.

It may import the modules beside this folder (messages, configuration, modeling, attention), and no other folder.
"""
