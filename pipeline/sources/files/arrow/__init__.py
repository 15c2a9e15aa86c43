"""Rows of Parquet and Arrow files, which claim things before they are read."""
