"""The ledger: usage and credits, each applied once; balances and reports."""
