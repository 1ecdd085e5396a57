"""One file a format: what records a source holds."""
