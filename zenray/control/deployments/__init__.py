"""Deployments: what was asked to be served, and making Ray Serve match it."""
