"""Benchmarks of the kernels beside PyTorch and ONNX Runtime; see bench/README.md."""
