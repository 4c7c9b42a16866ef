"""Everything the four scripts share that is not the method itself."""
