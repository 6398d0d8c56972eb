"""The training of a model: loop, steps, optimiser, accumulation, utilisation."""
