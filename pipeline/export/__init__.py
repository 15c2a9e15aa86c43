"""Policies for elsewhere: merged into their start, and copied out of the store."""
