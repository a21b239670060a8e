"""The engine behind test_client.py: sends load, measures it without fooling itself, and reports. Standard library only.

Reading order: options, target, connection, schedule, engine; latencies, recording, results, checks; screen, report;
session, which runs one after the other.
"""

VERSION = "0.1.0"  # of the balancer that it comes with, which it does not import
