"""Lottery tickets: combined, compared, controlled and carried to another task. Pure: tensors in, values out."""
