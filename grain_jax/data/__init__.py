"""From what people have to batches: sources, shards, the input pipeline. Never imports JAX."""
