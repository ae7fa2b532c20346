"""What every other folder speaks: programs, placements, nodes and where they come from."""
