"""What is measured of a model: how well it does, how much work it is, and how large."""
