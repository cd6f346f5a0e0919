"""Pallas kernels for TPUs, one file a kernel."""
