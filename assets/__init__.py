"""The Dagster code location: assets, checks and jobs, one set per plan."""
