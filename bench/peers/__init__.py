"""The same mathematics written with other tools, to measure beside."""
