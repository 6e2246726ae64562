"""The `zenray` command: the only package that may import everything, because it puts the parts together."""
