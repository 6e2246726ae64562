"""What must be remembered: organisations, keys, the ledger, deployments; and what gateways are told of it."""
