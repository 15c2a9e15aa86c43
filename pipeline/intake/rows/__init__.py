"""From the bytes of rows to units that keep the contract."""
