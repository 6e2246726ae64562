"""Runs a deployment inside Ray Serve: the engine seam (vLLM, scripted), weights, autoscaling."""
