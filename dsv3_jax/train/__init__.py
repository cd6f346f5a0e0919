"""Training: state, step, optimizer, metrics, and the parts of the loop that train.py tells."""
