"""One process that starts, watches, restarts and stops the parts of a platform on one machine."""
