"""How long it takes to ask many losses about many pairs."""
