"""The ladder: attention from its formula to the product's kernels, in rungs that a reader can compare.

ops: a rung's kernels as an op like any other; rungs: the ladders as data; climb: check and time them; peer: PyTorch's
attention beside them; picture: the times as a picture. Kernels: cuda_src/ladder/. No model uses any of it.
"""
