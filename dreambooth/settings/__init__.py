"""Settings: the tables of options, and where their values come from."""
