"""evals of grain_jax."""
