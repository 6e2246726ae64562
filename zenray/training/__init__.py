"""Training on Ray Train: a job file in, a published model version out.

Shape suffixes are those of `zenray.model`: B batch, S sequence, T tokens, D hidden, V vocabulary, E experts,
K experts per token, R rows, L layers with experts.
"""
