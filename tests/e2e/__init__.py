"""The whole platform up, with real models: one platform for the whole session."""
