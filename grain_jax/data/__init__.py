"""data of grain_jax."""
