"""Who pays for the pruning: each class and group before and after, with intervals, exact tests and a model of it."""
