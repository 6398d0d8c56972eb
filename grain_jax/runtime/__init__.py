"""What a run stands on: devices, processes, checkpoints, metrics."""
