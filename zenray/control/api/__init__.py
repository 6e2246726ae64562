"""The admin API over HTTP: routes for people and tools, errors, health, metrics."""
