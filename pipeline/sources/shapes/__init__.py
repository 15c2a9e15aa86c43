"""One reader per published shape: a parsed row to its preferences, labels or candidates."""
