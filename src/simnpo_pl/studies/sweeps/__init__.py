"""Tables of a paper: methods x splits x seeds, each a run of its own, shared among workers."""
