"""From a proposal to a plan: trials, tickets and transfers, as ops on their parents."""
