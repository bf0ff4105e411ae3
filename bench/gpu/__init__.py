"""Benchmarks of the GPU kernels beside cuDNN, and the check of everything that needs a GPU."""
