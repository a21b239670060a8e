"""What may be done to requests on their way, each a Filter that a route has or has not."""
