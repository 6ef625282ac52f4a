"""Which operations act on a slim activation part by part, and how."""
