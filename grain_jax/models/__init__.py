"""Towers, decoder, and the model that they make."""
