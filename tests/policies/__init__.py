"""A package, so that what its tests share can be imported."""
