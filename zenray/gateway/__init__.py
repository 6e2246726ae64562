"""The public door: OpenAI routes, keys, limits, routing, failover, metering; no database."""
