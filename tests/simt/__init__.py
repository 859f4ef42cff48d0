"""The SIMT emulator: see README.md."""
