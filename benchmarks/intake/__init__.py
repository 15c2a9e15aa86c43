"""A file of a million rows, one per cent of it garbage: is all of it found, how fast, how large?"""
