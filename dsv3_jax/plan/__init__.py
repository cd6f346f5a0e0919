"""Size, memory and least time of a run before any machine is paid for: `python -m dsv3_jax.plan`.

No model runs here. Shapes and shardings come from `jax.eval_shape`; programs are compiled for their machine, with no machine
there, and their memory and traffic are read from the compiler. A compile proves that a program exists and fits, not that it
computes the right thing: tests on eight CPU devices do that.
"""
