"""The embedded set: drawn scenes with exact boxes, descriptions and masks."""
