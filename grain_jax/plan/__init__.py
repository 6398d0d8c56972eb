"""Planning a run: the train step compiled ahead of time for a machine that need not be there."""
