"""Several worker processes of one balancer, and their master."""
