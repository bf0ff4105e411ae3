"""Triton kernels. Their launchers are in :mod:`dfs_kernels.backends.triton`."""
