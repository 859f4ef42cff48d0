"""The CUDA backend: launches are planned, compiled at run time, queued on one GPU, and captured as CUDA graphs."""
