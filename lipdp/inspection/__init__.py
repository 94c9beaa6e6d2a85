"""What can be told of a network before it is trained, and mended."""
