"""Public test doubles: a publisher in memory, a mirror that can lie. For tests, the demo and your own trials."""
