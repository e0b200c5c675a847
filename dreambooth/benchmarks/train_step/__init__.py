"""The parts of `benchmark train`: watched processes, our runs, a peer's runs, counted work."""
