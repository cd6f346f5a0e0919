"""Device mesh, sharding, expert parallelism, devices and hosts."""
