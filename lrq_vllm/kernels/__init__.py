"""Kernels and their plain-torch twins. Importing this package imports neither Triton nor vLLM."""
