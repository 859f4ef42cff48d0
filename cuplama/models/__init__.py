"""What models are: config, families, checkpoints, rope tables, and the graph of nodes that a model is."""
