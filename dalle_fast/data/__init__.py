"""Data: reading captioned images, turning them into tensors and tokens, and writing the demo data sets."""
