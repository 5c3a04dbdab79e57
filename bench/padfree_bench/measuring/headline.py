"""The cases that the headline is about, and how a run is told of tuned rows; without torch, so that the GPU round can ask."""

# BERT-base's heads and the notebook's.
HEADLINE = ("B64-H12-D64-S400-imdb-bf16", "B64-H4-D8-S400-imdb-bf16")
# The environment variable that names a tune.json, whose accepted rows come before the table's own.
TUNED_ROWS = "PADFREE_TUNED_ROWS"
