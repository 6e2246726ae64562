"""The Mixture-of-Distilled-Experts network on one device, its making from a dense one, and its way into other tools.

Shape suffixes, the same in every tensor module (`x_TD` is a float tensor of tokens by hidden size):

    B batch      S sequence       T tokens (B·S)          D hidden size     V vocabulary
    H heads      N key/value heads   C head size          L past + S (length of the keys)
    E experts    K experts per token   R rows: (token, expert) pairs, sorted by expert     I width of an expert
"""
