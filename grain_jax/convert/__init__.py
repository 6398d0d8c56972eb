"""Weights of other projects: a module for each format, its table read in both directions."""
