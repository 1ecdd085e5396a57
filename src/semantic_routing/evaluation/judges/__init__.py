"""Models that judge images."""
