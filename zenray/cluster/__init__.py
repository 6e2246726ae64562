"""Turn a spec into something running: local Ray, or a fake of it."""
