"""The demo that start_all.py runs. Standard library alone: it runs before anything is installed."""
