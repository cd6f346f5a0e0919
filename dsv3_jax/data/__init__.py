"""Data pipeline: sources, the held-out split, the tokenizer, packed training batches and held-out windows."""
