"""Training under masks: the loop, its optimizers, and what makes it cheaper without changing it."""
