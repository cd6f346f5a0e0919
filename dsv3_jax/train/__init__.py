"""Training: step, state, optimizer, guards and evaluation (core); start, logging, report and profiling (kit)."""
