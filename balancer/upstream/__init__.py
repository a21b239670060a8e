"""The way to one backend: connections, requests as they go out, responses as they come in."""
