"""Audio in: the only package that opens a data set or decodes a file."""
