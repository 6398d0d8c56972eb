"""The building of shards: blocks, tasks, workers, what is said of them."""
