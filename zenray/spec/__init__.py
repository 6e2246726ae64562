"""The words that every other package shares. Imports nothing of ours."""
