"""Show people what directories hold: pages, tables in the terminal, the story of one sample."""
