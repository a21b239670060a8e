"""What happened: records, counts, times, events, logs."""
