"""Readers of the data sets' own file formats, from a folder that the user names."""
