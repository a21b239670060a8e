"""Who gets the request: the backends, what is known of them, and how one is chosen."""
