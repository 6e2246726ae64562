"""From text to packed sequences in a fixed order."""
