"""Studies: how good generated images are, and many runs that are compared."""
