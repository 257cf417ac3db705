"""Examples -> flat micro-batches: the plan of a run's steps, shared prefixes, collation."""
