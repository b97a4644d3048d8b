"""A study handed to the tools that others look at searches with."""
