"""What is measured of a model that is handed in as functions."""
