"""The emulator: CUDA kernels on the CPU, with their races, bounds and barriers checked. See README.md."""
