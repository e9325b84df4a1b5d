"""The log-prob store: what every expert says about every token, how it is cut, and on disk."""
