"""The golden models: which there are, how they are written and what they must show. `tools.make_goldens` runs it."""
