"""Engines: what computes the tokens of one replica, as an ASGI application with vLLM's OpenAI routes."""
