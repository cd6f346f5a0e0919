"""What a run is made of and what it takes, before anything is paid for: `python -m dsv3_jax.plan`.

Nothing here runs a model. Shapes and shardings come from `jax.eval_shape`; programs are compiled for the machine they are
meant for, with no machine there, and their memory and traffic are read off the compiler. A compile proves that a program
exists and fits, not that it computes the right thing: that is what the tests on eight CPU devices are for.
"""
