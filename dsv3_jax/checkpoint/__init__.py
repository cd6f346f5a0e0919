"""Checkpoints: a run's own, through Orbax, and Hugging Face folders, read and written."""
