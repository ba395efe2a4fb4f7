"""Triton kernels and their launchers. Imported only by the back-end adapters, and only when they run."""
