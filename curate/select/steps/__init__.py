"""The selection steps, one file a kind: each says which of the rows still alive stay."""
