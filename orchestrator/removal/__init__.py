"""Masked units taken out for good: the smaller model, proved equal to the masked one."""
