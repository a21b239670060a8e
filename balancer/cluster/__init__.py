"""Several balancers that know of each other."""
