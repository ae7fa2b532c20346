"""The terms of all other folders: programs, placements, nodes and where they come from."""
