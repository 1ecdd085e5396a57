"""What semroute data does beside indexing."""
