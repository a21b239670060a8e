"""Clients, threads, processes: whatever brings requests and takes answers."""
