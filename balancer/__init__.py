"""A load balancer in Python: a threaded WSGI reverse proxy with health checks and run-time control."""

__version__ = "0.1.0"
