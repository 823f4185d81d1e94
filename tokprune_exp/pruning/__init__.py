"""Which tokens stay: scorers give an importance per token, retainers turn importances into a keep mask."""
