"""What gateways talk to: the snapshot, leases, and the intake of usage."""
