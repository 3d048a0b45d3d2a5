"""From a model reference to a snapshot: resolve, plan, execute."""
