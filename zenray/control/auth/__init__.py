"""Organisations, API keys, and the tokens of operators and gateways."""
