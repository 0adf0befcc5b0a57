"""The pure library: what fits, how fast it runs, what to choose, what is wrong, how many."""
