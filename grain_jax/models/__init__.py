"""models of grain_jax."""
