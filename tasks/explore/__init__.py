"""Pages of the explorer: what they are said in, and those of the spine. `functok.explorer` serves them."""
