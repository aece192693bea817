"""Write a selection as shards and tables that other programs read."""
