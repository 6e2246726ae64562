"""zenray: make, tune, serve, ask and bill a family of Mixture-of-Distilled-Experts language models, on Ray."""

__version__ = "0.1.0"
