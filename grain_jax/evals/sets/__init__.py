"""Outside datasets, one file a family, found by name through `suite`."""
