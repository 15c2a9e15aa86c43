"""Measurements that are run by hand, on the machine they are about."""
