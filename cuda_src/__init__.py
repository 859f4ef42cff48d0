"""The CUDA C++ sources, carried as package data."""
