"""What directories hold, for people: pages, tables in the terminal, the life of one sample."""
