"""What lies on disk: where it is, tars, sidecars and their columns, manifests, instruction records."""
