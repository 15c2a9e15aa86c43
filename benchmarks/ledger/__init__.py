"""How long it takes to know that everything is scored."""
