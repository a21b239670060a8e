"""One request on its way from its client to a backend and back."""
