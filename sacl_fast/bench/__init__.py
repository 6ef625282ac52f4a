"""``sacl-fast bench``: this engine's step against the supplement's pseudocode, on any machine."""
