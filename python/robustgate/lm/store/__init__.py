"""The log-prob store: what every expert says about every token, on disk."""
