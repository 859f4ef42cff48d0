"""cuplama: a torch-free runtime for Llama-family language models."""
