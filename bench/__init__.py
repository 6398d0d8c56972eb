"""Timings and counts, one module per question."""
