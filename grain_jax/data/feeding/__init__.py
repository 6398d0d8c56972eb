"""Batches made by worker processes in memory that they share (`config.data.workers`)."""
