"""Shipped pipelines (TOML) and the demo's models, as package data."""
